"""16-bit floating point as a storage format: fp16 and bf16.

What it does: weights are rounded to the nearest fp16 (11 significant bits, up to 65,504) or bf16 (8 bits, the range of
fp32), ties to even, and computed with in fp32. Suggested: fp16 for trained weights, which are small; bf16 for a
checkpoint that was trained in it, where it loses nothing. When it hurts: a weight beyond fp16's range becomes infinite, and
the candidate is refused; bf16 keeps a relative error of 0.2 %. What it gains depends on the engine, see
hardware_profiles/kernels.py. Source: Micikevicius et al. 2018, arXiv 1710.03740; Kalamkar et al. 2019, arXiv 1905.12322.
"""

from __future__ import annotations

import torch

from paretune.spaces.candidate import Half

DTYPES: dict[Half, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def to_half(weight: torch.Tensor, half: Half) -> torch.Tensor:
    """`weight` of any shape as fp16 or bf16. Raises ValueError where a finite weight lies beyond the type's range."""
    found = weight.detach().to(DTYPES[half])
    if bool((torch.isinf(found) & torch.isfinite(weight)).any()):
        largest = float(weight.detach().abs().max())
        raise ValueError(f"|weight| must be at most 65504 in {half}, but got {largest:g}; use bf16 or fp32")
    return found
