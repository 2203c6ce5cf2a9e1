"""Engines in child processes: a crash or a lack of memory ends the child, never the search."""
