"""In which precision this machine trains: bfloat16 products where they are faster, float32 where the CPU only emulates them.

A CPU without AVX-512 or AMX multiplies bfloat16 in software, ten to a hundred times as slowly as float32. Which of both is faster
is measured once per process, because no flag of the CPU says it on every architecture.
"""

from __future__ import annotations

import functools
import time

import torch

SIZE, REPEATS = 256, 3


@functools.cache
def training_dtype() -> torch.dtype:
    """Return bfloat16 if this machine multiplies matrices in it at least as fast as in float32, else float32."""
    return torch.bfloat16 if _seconds(torch.bfloat16) <= _seconds(torch.float32) else torch.float32


def autocast() -> torch.autocast:
    """Return a context in which torch multiplies matrices in `training_dtype`."""
    return torch.autocast("cpu", torch.bfloat16, enabled=training_dtype() is torch.bfloat16)


def _seconds(dtype: torch.dtype) -> float:
    """The shortest of REPEATS products of two matrices [SIZE, SIZE], after one that warms up."""
    x = torch.ones(SIZE, SIZE, dtype=dtype)
    times = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            x @ x
            times.append(time.perf_counter() - start)
    return min(times[1:])
