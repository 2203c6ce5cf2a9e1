"""Measuring an artifact again, and sweeps over its prompt and batch."""
