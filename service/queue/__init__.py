"""The queue of searches and their processes."""
