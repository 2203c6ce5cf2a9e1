"""Joint search over student size, sparsity and precision of a trained language model, per hardware profile."""

__version__ = "0.1.0"
