"""Teachers that are any torch module."""
