"""Round to nearest on the grid of ONNX Runtime's MatMulNBits: symmetric, in groups along K or per channel, no zero point.

What it does: a weight becomes `code * scale` with codes in [-2^(b-1), 2^(b-1)-1]. The scale of a group maps its entry of largest
magnitude exactly to -2^(b-1), which uses the whole range (the rule of MLAS and of llama.cpp's Q4_0); it may be negative.
Zeros stay zero, so a sparsity mask survives. Activations (accuracy_level 4) are rounded to int8 per group of K with
scale absmax/127, as the engine does at run time. Weights of one scale per output row ship in the engine's largest
blocks, each with the row's scale.

Suggested: int8 or int4 in groups of 32; no calibration text is needed. When it hurts: large groups and few bits with
outliers (clip.py, gptq.py). Source: Jacob et al. 2018, arXiv 1712.05877; the scale rule is llama.cpp's and MLAS's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paretune.compression.quantize.half import to_half
from paretune.spaces.candidate import Format, block_for, group_for

# Small, because int8 kernels add and take away (128 * scale * activations): with a scale of 1 zeros come out as 1e-4.
EMPTY_SCALE = 2.0**-20


@dataclass(frozen=True)
class Quantized:
    """Integer codes [N, K] (int8) and scales [N, K / group_size] (float32) of one matrix.

    `input_scale` is that of its activations where they are static, else 0.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group_size: int
    input_scale: float = 0.0

    def dequantize(self) -> torch.Tensor:
        """The float32 matrix [N, K] that the engine computes with."""
        n, k = self.codes.shape
        groups = self.codes.float().view(n, -1, self.group_size) * self.scales.unsqueeze(-1)
        return groups.view(n, k)


def quantize(weight: torch.Tensor, form: Format) -> Quantized:
    """Round `weight` [N, K] to nearest. The group size is repaired to the largest engine block that divides K."""
    n, k = weight.shape
    group = group_for(form.group_size, k)
    blocks = weight.detach().float().view(n, k // group, group)
    scales = scales_of(blocks, form.bits)
    top = 2 ** (form.bits - 1)
    codes = torch.round(blocks / scales.unsqueeze(-1)).clamp_(-top, top - 1).to(torch.int8)
    return Quantized(codes.view(n, k), scales, form.bits, group)


def fake_quantize(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """What the engine will compute with, [N, K]; gradients pass straight through to `weight` (Bengio et al. 2013)."""
    if form.bits == 32:
        return weight
    rounded = quantize(weight, form).dequantize() if form.is_integer else to_half(weight, form.half).float()
    return weight + (rounded - weight).detach() if weight.requires_grad else rounded


def fake_quantize_activations(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Round the last dimension of `x` to int8 per group of `group_size` (0: leave it); gradients pass straight through."""
    if group_size == 0:
        return x
    blocks = x.detach().float().view(*x.shape[:-1], -1, group_size)
    scale = blocks.abs().amax(-1, keepdim=True).div_(127.0).clamp_(min=1e-30)
    rounded = torch.round(blocks / scale).mul_(scale).flatten(-2).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def activation_block(form: Format, k: int) -> int:
    """The run of K in which "int8" activations share a scale, 0 where they are not rounded: ONNX Runtime has no int8 kernel for
    2-bit weights in blocks of 16, and falls back to fp32 arithmetic."""
    block = block_for(form.group_size, k, form.bits)
    return 0 if form.bits == 2 and block == 16 else block


def scales_of(blocks: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale per group (the last dimension): its entry of largest magnitude over -2^(bits-1); `EMPTY_SCALE` where all are zero."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    extreme = torch.where(high > -low, high, low)
    scales = extreme / -float(2 ** (bits - 1))
    return torch.where(scales == 0, torch.full_like(scales, EMPTY_SCALE), scales)
