"""Weights and activations on the engine's own grid: one module per method, its card in its docstring."""

from paretune.compression.quantize.grid import Quantized, fake_quantize, fake_quantize_activations, quantize

__all__ = ["Quantized", "fake_quantize", "fake_quantize_activations", "quantize"]
