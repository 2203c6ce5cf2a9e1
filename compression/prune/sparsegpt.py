"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): drop what costs least, let the later columns make up for it.

The cost of an entry is w² / U[j, j]² with U the factor of the inverse Hessian, as in the paper's algorithm; that of a block of
columns S is |U[S, S]^-T w_S|², of which the paper's is the case of one column. Both are what the output loses when the
entries go and all later columns adapt. Which entries go is decided at the start of every 128 columns (every 4 for 2:4), over
all rows together, so each such chunk loses the same share; at a threshold, what costs less than its square times the mean
cost of the untouched matrix goes.
"""

from __future__ import annotations

import torch

from paretune.compression.hessian import inverse_factor
from paretune.compression.prune.masks import block_width, keep_largest, two_of_four
from paretune.spaces.candidate import Pattern

CHUNK = 128


def sparsegpt(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask (True where it stays) and compensated weights [N, K] of `weight`, given the Gram matrix [K, K] of its inputs.

    The pattern's score is not looked at. Raises ValueError if `gram` is not finite, K does not fit the pattern, or the mask is a
    given one, which needs no scores.
    """
    if pattern.kind == "none":
        return torch.ones_like(weight, dtype=torch.bool), weight
    if pattern.kind == "given":
        raise ValueError("SparseGPT decides what goes, but the pattern is a given mask: call mask_for() instead")
    k = weight.shape[1]
    step, width = 4 if pattern.kind == "2:4" else CHUNK, block_width(pattern, k)
    if k % 4 and pattern.kind == "2:4":
        raise ValueError(f"2:4 needs K to be a multiple of 4, but got K={k}")
    upper = inverse_factor(gram).float()
    left = weight.detach().float().T.clone(memory_format=torch.contiguous_format)  # [K, N]
    mask = torch.ones_like(left, dtype=torch.bool)
    limit = pattern.threshold**2 * float(_cost(left, upper, 1).mean()) if pattern.kind == "threshold" else 0.0
    for start in range(0, k, CHUNK):
        end = min(start + CHUNK, k)
        errors = torch.zeros(end - start, left.shape[1])
        for j in range(start, end):
            if j % step == 0:
                stop = min(j + step, end)
                cost = _cost(left[j:stop], upper[j:stop, j:stop], width)
                kept = cost >= limit if pattern.kind == "threshold" else _cheapest_go(cost, pattern, j // width)
                mask[j:stop] = kept.repeat_interleave(width, 0)
            errors[j - start] = left[j] * ~mask[j] / upper[j, j]
            left[j] *= mask[j]
            left[j + 1 : end] -= torch.outer(upper[j, j + 1 : end], errors[j - start])
        left[end:] -= upper[start:end, end:].T @ errors
    return mask.T.contiguous(), left.T.contiguous()


def _cost(left: torch.Tensor, upper: torch.Tensor, width: int) -> torch.Tensor:
    """What it costs to drop each run of `width` columns: [columns / width, N] from weights [columns, N]."""
    if width == 1:
        return (left / upper.diagonal().unsqueeze(1)).square()
    blocks = left.view(-1, width, left.shape[1])
    corners = torch.stack([upper[s : s + width, s : s + width].T for s in range(0, len(left), width)])
    solved: torch.Tensor = torch.linalg.solve_triangular(corners, blocks, upper=False)
    return solved.square().sum(1)


def _cheapest_go(cost: torch.Tensor, pattern: Pattern, before: int) -> torch.Tensor:
    """Mask of a chunk of `cost` [units, N] with `before` units in earlier chunks, whose rounded shares add up to the ratio."""
    if pattern.kind == "2:4":
        return two_of_four(cost.T).T
    units, n = cost.shape
    dropped = round(pattern.ratio * n * (before + units)) - round(pattern.ratio * n * before)
    return keep_largest(cost.reshape(1, -1), dropped).view_as(cost)
