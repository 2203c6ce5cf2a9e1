"""Training batches as a pure function of (seed, step), so that an interrupted training continues with the same text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class Batches:
    """Shuffled windows of `context` tokens without replacement, shifted at random after the first epoch."""

    def __init__(
        self, tokens: Sequence[int] | npt.NDArray[Any] | torch.Tensor, context: int, batch: int, seed: int
    ) -> None:
        if len(tokens) < context + 2:
            raise ValueError(f"the text must have more than {context + 1} tokens, but has {len(tokens)}")
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self.windows = (len(tokens) - 1) // context
        self.per_epoch = max(1, self.windows // batch)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> torch.Tensor:
        """Token ids of step `step`, int64, shape [batch, context]."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.windows, generator=generator)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shift = int(torch.randint(0, self.context, (1,), generator=generator)) if epoch else 0
        chosen = [int(self._order[(position * self.batch + i) % self.windows]) for i in range(self.batch)]
        starts = [min(i * self.context + shift, len(self.tokens) - self.context - 1) for i in chosen]
        return torch.from_numpy(
            np.stack([np.asarray(self.tokens[s : s + self.context]).astype(np.int64) for s in starts])
        )
