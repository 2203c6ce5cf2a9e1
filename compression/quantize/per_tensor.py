"""Activations of 8 bits with one scale for the whole tensor: dynamic and static int8 (Jacob et al. 2018, arXiv 1712.05877).

What it does: the engine multiplies 8-bit activations with int8 weights (one scale per output row) in integers. Dynamic: scale
and zero point are those of ONNX's DynamicQuantizeLinear, from the smallest and largest entry of the tensor at hand, so they
depend on what else is in the batch; a prompt is rounded as a whole, a decoded token alone. Static: one scale per matrix,
set beforehand to the clipping that loses least on calibration text (mean squared error over `CLIPPINGS`, as in Banner,
Nahshan, Soudry 2019, arXiv 1810.05723, by search), symmetric, so that zeros stay zero.

Suggested: on ONNX Runtime where the time to the first token is what counts: prefill is about twice as fast as with a scale per
block, decoding about a tenth slower, and more is lost (docs/log.md). They are what engines without blocks take: NPUs,
microcontrollers, TensorRT. When it hurts: a few activations of a language model
are a hundred times as large as the rest (Dettmers et al. 2022, arXiv 2208.07339), and one scale has to cover them all.
"""

from __future__ import annotations

import torch

CLIPPINGS = tuple(i / 32 for i in range(4, 33))
SAMPLES = 2**18


def fake_quantize_dynamic(x: torch.Tensor) -> torch.Tensor:
    """Round every sequence of `x` [batch, length, K] as ONNX's DynamicQuantizeLinear rounds a batch of one.

    Gradients pass straight through. A tensor of fewer dimensions is one sequence.
    """
    inner = x.detach().float()
    dims = (-2, -1) if x.ndim > 2 else tuple(range(x.ndim))
    low, high = inner.amin(dims, keepdim=True).clamp_(max=0), inner.amax(dims, keepdim=True).clamp_(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp_(0, 255))
    rounded = ((torch.round(inner / scale) + zero).clamp_(0, 255) - zero).mul_(scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def fake_quantize_static(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Round `x` to multiples of `scale` from -128 to 127; gradients pass straight through."""
    step = torch.tensor(scale, dtype=torch.float32)
    rounded = torch.round(x.detach().float() / step).clamp_(-128, 127).mul_(step).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def static_scale(x: torch.Tensor) -> float:
    """The scale whose rounding of the calibration inputs `x` has the least squared error: a fraction of |x|'s maximum over 127.

    At most `SAMPLES` evenly spread entries are looked at beside the maximum. Raises ValueError if an entry is not finite.
    """
    values = x.detach().float().flatten()
    largest = float(values.abs().max())
    if not largest < float("inf"):
        raise ValueError("the calibration inputs must be finite, but they are not")
    if largest == 0:
        return 1.0
    sample = values[:: max(1, len(values) // SAMPLES)]
    scales = [largest * clipping / 127 for clipping in CLIPPINGS]
    return min(scales, key=lambda s: float((fake_quantize_static(sample, s) - sample).square().sum()))
