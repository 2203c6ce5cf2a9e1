"""Which explored candidates deserve recovery and confirmation: round-robin over strata, the best of each by rank, then by how
far it is from what is confirmed already.

A stratum is a sparsity pattern with a layer precision. Strata that reach the estimated front come first in every round;
every other stratum is visited once, so that the calibration learns what recovery does for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paretune.objectives.quality.quality import relative
from paretune.search.front import Vector, ranks

LEAST_INCREASE = 0.005  # below half a per cent two students are as good as each other
TINY = 1e-12


@dataclass(frozen=True)
class Explored:
    """A rung-0 candidate: estimated objectives (minimized) and its stratum."""

    key: str
    stratum: str
    vector: Vector


def next_finalist(
    explored: list[Explored], chosen: list[str], confirmed: list[Vector], scale: Callable[[Vector], Vector] = tuple
) -> str | None:
    """Key of the next finalist, or None if all were chosen. `confirmed` vectors (baselines too) compete for the front;
    distances are taken between scaled vectors."""
    taken = set(chosen)
    open_ones = [e for e in explored if e.key not in taken]
    if not open_ones:
        return None
    points = [e.vector for e in open_ones]
    rank, distance = (
        ranks([*points, *confirmed])[: len(points)],
        gaps([scale(v) for v in points], [scale(v) for v in confirmed]),
    )
    visits = Counter(e.stratum for e in explored if e.key in taken)
    best: dict[str, int] = {}
    for i, e in enumerate(open_ones):
        j = best.get(e.stratum)
        if j is None or (rank[i], -distance[i]) < (rank[j], -distance[j]):
            best[e.stratum] = i

    def turn(i: int) -> tuple[int, int, int, float]:
        visited = visits[open_ones[i].stratum]
        promising = rank[i] == 0
        return (
            visited if promising else max(visited, 10 * min(visited, 1)),
            0 if promising else 1,
            rank[i],
            -distance[i],
        )

    return open_ones[min(best.values(), key=turn)].key


def gaps(points: Sequence[Vector], confirmed: Sequence[Vector]) -> list[float]:
    """Distance of every point to the nearest confirmed one, summed over the objectives, each in units of its whole range;
    infinite if none is confirmed."""
    if not points or not confirmed:
        return [math.inf] * len(points)
    mine, taken = np.array(points, dtype=float), np.array(confirmed, dtype=float)
    scale = np.ptp(np.vstack([mine, taken]), axis=0)
    scale[scale == 0] = 1.0
    return [float(np.abs((taken - point) / scale).sum(axis=1).min()) for point in mine]


def perceived(vector: Vector, quality: int, teacher: float) -> Vector:
    """An objective vector on the scales on which people compare: the quality (the vector's entry of that number) as the
    logarithm of its relative increase over the teacher's value, from LEAST_INCREASE on; all others as their own logarithm.

    So 0.5 and 2 % are as far apart as 5 and 20 %, and half the latency as a quarter from half.
    """
    found = [math.log(max(value, TINY)) for value in vector]
    increase = relative(vector[quality] - teacher, teacher)
    found[quality] = math.log(max(increase, LEAST_INCREASE))
    return tuple(found)
