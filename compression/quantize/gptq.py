"""GPTQ (Frantar et al. 2022, arXiv 2210.17323) on the engine's grid: round a column, let the later columns make up for it.

What it does: columns are rounded in their own order (no act-order, the engine's groups are consecutive). A group's scales are fixed when
the first of its columns is reached, from the weights as they then are. Rounding to nearest is the special case of inputs
that are not correlated. Suggested: int4 with little time to recover. When it hurts: calibration text unlike the text of use;
time grows with the cube of a matrix's inputs. See README.md.
"""

from __future__ import annotations

import torch

from paretune.compression.hessian import inverse_factor
from paretune.compression.quantize.grid import Quantized, scales_of
from paretune.spaces.candidate import Format, group_for

CHUNK = 128


def gptq(weight: torch.Tensor, gram: torch.Tensor, form: Format, mask: torch.Tensor | None = None) -> Quantized:
    """Codes of `weight` [N, K] that keep its output on inputs with the Gram matrix `gram` [K, K].

    Entries where `mask` is False get code 0, and what they held counts as an error to be made up for. The group size is
    repaired to the largest engine block that divides K. Raises ValueError if `gram` is not finite.
    """
    n, k = weight.shape
    group = group_for(form.group_size, k)
    top = 2 ** (form.bits - 1)
    upper = inverse_factor(gram).float()
    left = weight.detach().float().T.clone(memory_format=torch.contiguous_format)  # [K, N], what is still to be rounded
    kept = torch.ones_like(left) if mask is None else mask.T.to(left.dtype)
    codes, scales = torch.zeros_like(left), torch.empty(n, k // group)
    for start in range(0, k, CHUNK):  # a group is within a chunk or starts with one, so its weights are up to date
        end = min(start + CHUNK, k)
        errors = torch.zeros(end - start, n)
        for j in range(start, end):
            if j % group == 0:
                block = (left[j : j + group] * kept[j : j + group]).T
                scales[:, j // group] = scales_of(block.unsqueeze(1), form.bits).squeeze(1)
            scale = scales[:, j // group]
            codes[j] = torch.round(left[j] / scale).clamp_(-top, top - 1) * kept[j]
            errors[j - start] = (left[j] - codes[j] * scale) / upper[j, j]
            left[j + 1 : end] -= torch.outer(upper[j, j + 1 : end], errors[j - start])
        left[end:] -= upper[start:end, end:].T @ errors
    return Quantized(codes.T.to(torch.int8).contiguous(), scales, form.bits, group)
