"""Masks by magnitude and by Wanda (Sun et al. 2023, arXiv 2306.11695): |W| times the L2 norm of the input feature.

Wanda and N:M compare inside an output row, as in the paper; magnitude at a ratio compares over the whole matrix.
"""

from __future__ import annotations

import torch

from paretune.spaces.candidate import Pattern


def mask_for(weight: torch.Tensor, pattern: Pattern, input_norm: torch.Tensor | None) -> torch.Tensor:
    """Boolean mask of `weight` [N, K], True where it stays.

    `input_norm` [K] is the L2 norm of every input feature over the calibration text; needed for "wanda".
    Raises ValueError if the score lacks it or K is no multiple of 4 for 2:4.
    """
    if pattern.kind == "none":
        return torch.ones_like(weight, dtype=torch.bool)
    score = _score(weight, pattern, input_norm)
    if pattern.kind == "2:4":
        return _two_of_four(score)
    if pattern.score == "wanda":
        return _keep_largest(score, pattern.ratio)
    return _keep_largest(score.reshape(1, -1), pattern.ratio).view(weight.shape)


def _score(weight: torch.Tensor, pattern: Pattern, input_norm: torch.Tensor | None) -> torch.Tensor:
    magnitude = weight.detach().abs().float()
    if pattern.score == "magnitude":
        return magnitude
    if input_norm is None:
        raise ValueError("the Wanda score needs the input norms of a calibration run, but got none")
    return magnitude * input_norm


def _two_of_four(score: torch.Tensor) -> torch.Tensor:
    n, k = score.shape
    if k % 4:
        raise ValueError(f"2:4 needs K to be a multiple of 4, but got K={k}")
    kept = score.view(n, k // 4, 4).topk(2, dim=-1).indices
    mask = torch.zeros(n, k // 4, 4, dtype=torch.bool)
    return mask.scatter_(-1, kept, True).view(n, k)


def _keep_largest(score: torch.Tensor, ratio: float) -> torch.Tensor:
    """Drop exactly round(ratio * columns) entries of every row."""
    dropped = round(ratio * score.shape[1])
    if dropped == 0:
        return torch.ones_like(score, dtype=torch.bool)
    indices = score.topk(dropped, dim=1, largest=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, indices, False)
