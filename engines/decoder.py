"""What every engine offers for a decoder. Adding an engine is one module with `open_model` and one line in catalog.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import numpy.typing as npt

CPU = "CPUExecutionProvider"
Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Generation(Protocol):
    """A KV cache that is being filled."""

    def step(self, ids: Ids) -> float:
        """Run ids [batch, length] after everything run before; returns the milliseconds that the engine took."""

    def logits(self) -> Logits:
        """Logits [batch, length, vocab] of the last step."""


class EngineDecoder(ABC):
    """A loaded decoder. All rows of a batch are equally long: nothing here pads."""

    vocab: int

    @abstractmethod
    def logits(self, ids: Ids) -> Logits:
        """Logits [batch, length, vocab] of token ids [batch, length] without a past."""

    @abstractmethod
    def begin(self, batch: int, length: int) -> Generation:
        """An empty KV cache for `batch` rows of up to `length` tokens."""

    def time_generation(self, prompt: int, new_tokens: int, batch: int = 1) -> tuple[float, list[float]]:
        """Milliseconds of one prefill of `prompt` tokens, and of each of `new_tokens` decode steps after it, `batch` rows at
        once."""
        run = self.begin(batch, prompt + new_tokens)
        ids = np.tile(np.arange(1, prompt + 1, dtype=np.int64) % self.vocab, (batch, 1))
        ttft, token, steps = run.step(ids), np.ascontiguousarray(ids[:, -1:]), []
        for _ in range(new_tokens):
            steps.append(run.step(token))
            token = (token * 31 + 7) % self.vocab
        return ttft, steps

    def stepped_logits(self, ids: Ids, prompt: int) -> Logits:
        """`logits(ids)` by another way: a prefill of the first `prompt` tokens, the rest one by one through the KV cache."""
        run = self.begin(*ids.shape)
        found = []
        for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
            run.step(np.ascontiguousarray(ids[:, start:stop]))
            found.append(run.logits())
        return np.concatenate(found, 1)
