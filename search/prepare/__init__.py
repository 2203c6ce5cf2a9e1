"""What is checked and planned before a search starts, and the studies of a home."""
