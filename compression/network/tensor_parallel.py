"""A teacher's forward pass over several ranks, each of which holds a part of the weights: Megatron-LM, arXiv 1909.08053.

The forward pass is that of student.py, called with one rank's tensors: fewer heads and neurons follow from their shapes. What is added
is where ranks must agree: the embedding is looked up where its row lies and summed; the attention's and the FFN's output
products are terms of a sum; the cross-entropy needs the maximum, the sum of exponentials and the target's logit over all
parts of the vocabulary, so whole logits are never gathered to be scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from paretune.compression.network.student import EMBEDDING, HEAD, LOGITS_AT_ONCE, Network
from paretune.spaces.candidate import Shape
from paretune.teachers.checkpoint.shards import part_of

SUMMED = ("self_attn.o_proj", "mlp.down_proj")
# A rank may wait for another that waits for the machine lock while a measurement runs.
EXCHANGE_TIMEOUT = timedelta(hours=2)


class Ranks:
    """This process as `rank` of `degree` that meet through a file in `folder` (gloo; one rank needs no others)."""

    def __init__(self, folder: Path, rank: int, degree: int) -> None:
        self.rank, self.degree = rank, degree
        if degree > 1:
            # By path: torch would not take back the quotes of a URL.
            meeting = distributed.FileStore(str((folder / "rendezvous").resolve()), degree)  # type: ignore[attr-defined]
            distributed.init_process_group(
                "gloo", store=meeting, rank=rank, world_size=degree, timeout=EXCHANGE_TIMEOUT
            )

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same bits on each."""
        return self._reduced(value, distributed.ReduceOp.SUM)

    def maximum(self, value: torch.Tensor) -> torch.Tensor:
        """The element-wise maximum over all ranks."""
        return self._reduced(value, distributed.ReduceOp.MAX)

    def _reduced(self, value: torch.Tensor, how: Any) -> torch.Tensor:
        if self.degree == 1:
            return value
        found = value.contiguous().clone()
        distributed.all_reduce(found, how)
        return found


class ShardedNetwork:
    """One rank's share of a teacher: every call must be made by all ranks, with the same token ids.

    `shard` is what teachers/checkpoint/shards.py reads. No gradients.
    """

    def __init__(
        self, config: Mapping[str, Any], shape: Shape, shard: Mapping[str, torch.Tensor], ranks: Ranks
    ) -> None:
        self.network = Network(config, shape, shape.layers)
        self.shape, self.shard, self.ranks = shape, shard, ranks
        self.first_row, self.end_row = part_of(shape.vocab, ranks.rank, ranks.degree)
        for layer in self.network.layers:
            for name in SUMMED:
                self.network.part(layer, name).register_forward_hook(self._sum_output)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Final hidden states [batch, length, hidden] of token ids [batch, length], the same on every rank."""
        with torch.no_grad():
            return self.network.hidden(self.shard, ids, entered=self._embedded(ids))

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Whole logits [batch, length, vocab] on every rank: for comparisons, scoring does without."""
        with torch.no_grad():
            own = self._own_logits(self.hidden(ids))
            whole = own.new_zeros((*own.shape[:-1], self.shape.vocab))
            whole[..., self.first_row : self.end_row] = own
            return self.ranks.sum(whole)

    def token_losses(self, ids: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats of every token but the first, [batch, length - 1], the same on every rank."""
        hidden, targets = self.hidden(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        rows = max(1, LOGITS_AT_ONCE // -(-self.shape.vocab // self.ranks.degree))  # equal on all ranks
        pieces = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        with torch.no_grad():
            return torch.cat([self._losses(h, t) for h, t in pieces]).view(len(ids), -1)

    def _losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._own_logits(hidden).float()
        top = self.ranks.maximum(logits.amax(-1))
        own, row = self._own_rows(targets)
        mine = logits.gather(-1, row[:, None])[:, 0].where(own, 0.0)
        exponentials, target = self.ranks.sum(torch.stack([(logits - top[:, None]).exp().sum(-1), mine]))
        losses: torch.Tensor = exponentials.log() + top - target
        return losses

    def _own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.shard.get(HEAD, self.shard[EMBEDDING]))

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        own, row = self._own_rows(ids)
        found = nn.functional.embedding(row, self.shard[EMBEDDING])
        return self.ranks.sum(found * own[..., None])

    def _own_rows(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(whether a token's row of the vocabulary lies here, its index here; 0 where it does not)."""
        own = (ids >= self.first_row) & (ids < self.end_row)
        return own, (ids - self.first_row).where(own, 0)

    def _sum_output(self, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return self.ranks.sum(output)
