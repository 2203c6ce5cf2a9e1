"""Engines: load an artifact's graph, score text with it, time it. Always in a child process of their own."""
