"""Telling somebody that a search has ended."""
