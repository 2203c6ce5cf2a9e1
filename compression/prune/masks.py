"""Masks by magnitude, by activation norm and by Wanda (Sun et al. 2023, arXiv 2306.11695), which is their product.

The activation norm is the L2 norm of an input feature over the calibration text, so a mask by it removes whole input features
of a matrix; it is the score of structural cuts (Minitron, arXiv 2407.14679). N:M, Wanda and activation at a ratio compare
inside an output row, magnitude at a ratio over the whole matrix. So do blocks, of which a row has too few to hit a ratio: a
block's score is the L2 norm of the scores in it. A threshold compares with the root mean square of the matrix's scores.
"""

from __future__ import annotations

import torch

from paretune.spaces.candidate import BLOCK, Pattern, group_for


def mask_for(weight: torch.Tensor, pattern: Pattern, input_norm: torch.Tensor | None) -> torch.Tensor:
    """Boolean mask of `weight` [N, K], True where it stays.

    `input_norm` [K] is the L2 norm of every input feature over the calibration text; needed for "wanda" and "activation".
    A "given" mask is where `weight` is not zero. Raises ValueError if the score lacks its norms, if K is no multiple of 4 for
    2:4 or of 16 for blocks, and for "sparsegpt", which does more than mask.
    """
    if pattern.kind == "none":
        return torch.ones_like(weight, dtype=torch.bool)
    if pattern.kind == "given":
        return weight != 0
    score = _score(weight, pattern, input_norm)
    if pattern.kind == "2:4":
        return two_of_four(score)
    if pattern.kind == "block":
        n, k = weight.shape
        width = block_width(pattern, k)
        blocks = score.view(n, k // width, width).norm(dim=-1)
        kept = keep_largest(blocks.reshape(1, -1), round(pattern.ratio * blocks.numel()))
        return kept.view_as(blocks).repeat_interleave(width, 1)
    if pattern.kind == "threshold":
        return score >= pattern.threshold * score.square().mean().sqrt()
    if pattern.score != "magnitude":
        return keep_largest(score, round(pattern.ratio * score.shape[1]))
    return keep_largest(score.reshape(1, -1), round(pattern.ratio * score.numel())).view(weight.shape)


def block_width(pattern: Pattern, k: int) -> int:
    """Columns that stay or go together: 1, or for blocks 32, repaired to 16 where 32 does not divide K."""
    return group_for(BLOCK, k) if pattern.kind == "block" else 1


def _score(weight: torch.Tensor, pattern: Pattern, input_norm: torch.Tensor | None) -> torch.Tensor:
    if pattern.score == "sparsegpt":
        raise ValueError("SparseGPT also moves the weights that it keeps: call sparsegpt() with a Gram matrix instead")
    magnitude = weight.detach().abs().float()
    if pattern.score == "magnitude":
        return magnitude
    if input_norm is None:
        raise ValueError(f"the {pattern.score} score needs the input norms of a calibration run, but got none")
    return magnitude * input_norm if pattern.score == "wanda" else input_norm.float().expand_as(magnitude)


def two_of_four(score: torch.Tensor) -> torch.Tensor:
    """Keep the two largest of every four entries of a row [N, K]."""
    n, k = score.shape
    if k % 4:
        raise ValueError(f"2:4 needs K to be a multiple of 4, but got K={k}")
    kept = score.view(n, k // 4, 4).topk(2, dim=-1).indices
    mask = torch.zeros(n, k // 4, 4, dtype=torch.bool)
    return mask.scatter_(-1, kept, True).view(n, k)


def keep_largest(score: torch.Tensor, dropped: int) -> torch.Tensor:
    """Drop the `dropped` smallest entries of every row [N, K]."""
    if dropped == 0:
        return torch.ones_like(score, dtype=torch.bool)
    indices = score.topk(dropped, dim=1, largest=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, indices, False)
