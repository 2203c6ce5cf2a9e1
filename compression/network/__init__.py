"""The student network, the statistics of its inputs, and networks that are divided among processes."""
