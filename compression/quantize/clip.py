"""Scale search: clip a group where that loses less than rounding all of it coarsely.

What it does: for every group of a matrix the scale is searched that loses least, the sum over entries of importance times
squared error, where importance is the mean square of the input feature on calibration text. `RATIOS` of the plain scale are
tried (at 2 bits in both directions, the grid has one more code on one side), then scale and codes are improved in turns:
least-squares scale for the codes, nearest codes for the scale, as in Lloyd's algorithm. It never loses more than
rounding to nearest does by that measure. Same grid and codes as rounding to nearest, so the same kernel and size.

Suggested: int2, and int4 with large groups or per channel, where one outlier takes the range of many entries. It needs
second moments only, so it also serves teachers too large for GPTQ. When it hurts: errors of different inputs that add up
are not seen (GPTQ sees them); calibration text unlike the text of use. Sources: clipping by search, Lin et al. 2023 (AWQ, arXiv
2306.00978) and Shao et al. 2023 (OmniQuant, arXiv 2308.13137); alternating scale and codes, Badri and Shaji 2023 (HQQ) and
llama.cpp's importance matrix.
"""

from __future__ import annotations

import torch

from paretune.compression.quantize.grid import Quantized, scales_of
from paretune.spaces.candidate import Format, group_for

RATIOS = tuple(0.4 + 0.05 * i for i in range(15))
TURNS = 3


def search_scales(weight: torch.Tensor, form: Format, importance: torch.Tensor | None = None) -> Quantized:
    """Codes of `weight` [N, K] with searched scales.

    `importance` [K], 0 or more, weighs the input features (None: all alike). Raises ValueError if it is not finite.
    """
    n, k = weight.shape
    group = group_for(form.group_size, k)
    blocks = weight.detach().float().view(n, k // group, group)
    weights = torch.ones(k) if importance is None else importance.detach().float()
    if not torch.isfinite(weights).all():
        raise ValueError("the importance of the input features must be finite, but it is not")
    search = _Search(blocks, weights.view(1, k // group, group), form.bits)
    plain = search.best.clone()
    for ratio in (r * sign for sign in ((1, -1) if form.bits == 2 else (1,)) for r in RATIOS):
        search.try_scales(plain * ratio)
    for _ in range(TURNS):
        search.try_scales(search.least_squares())
    codes, _ = search.round(search.best)
    return Quantized(codes.to(torch.int8).view(n, k), search.best, form.bits, group)


class _Search:
    """Groups [N, groups, size] with the best scales so far and what they lose."""

    def __init__(self, blocks: torch.Tensor, importance: torch.Tensor, bits: int) -> None:
        self.blocks, self.importance, self.top = blocks, importance, 2 ** (bits - 1)
        self.best = scales_of(blocks, bits)
        _, self.loss = self.round(self.best)

    def round(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nearest codes, and the loss of every group."""
        steps = scales.unsqueeze(-1)
        codes = torch.round(self.blocks / steps).clamp_(-self.top, self.top - 1)
        return codes, (codes * steps).sub_(self.blocks).square_().mul_(self.importance).sum(-1)

    def try_scales(self, scales: torch.Tensor) -> None:
        _, loss = self.round(scales)
        better = loss < self.loss
        self.best = torch.where(better, scales, self.best)
        self.loss = torch.where(better, loss, self.loss)

    def least_squares(self) -> torch.Tensor:
        """The scales that suit the best codes so far; those of groups without a code that counts stay."""
        codes, _ = self.round(self.best)
        weighted = codes * self.importance
        found = (weighted * self.blocks).sum(-1) / (weighted * codes).sum(-1)
        return torch.where(torch.isfinite(found) & (found != 0), found, self.best)
