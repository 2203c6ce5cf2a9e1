"""Which explored candidates deserve recovery and confirmation: round-robin over strata, the best of each by rank, then by how
far it is from what is confirmed already.

A stratum is a sparsity pattern with a layer precision. Strata that reach the estimated front come first in every round;
every other stratum is visited once, so that the calibration learns what recovery does for it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from paretune.search.front import Vector, ranks


@dataclass(frozen=True)
class Explored:
    """A rung-0 candidate: estimated objectives (minimized) and its stratum."""

    key: str
    stratum: str
    vector: Vector


def next_finalist(explored: list[Explored], chosen: list[str], confirmed: list[Vector]) -> str | None:
    """Key of the next finalist, or None if all were chosen. `confirmed` vectors (baselines too) compete for the front."""
    taken = set(chosen)
    open_ones = [e for e in explored if e.key not in taken]
    if not open_ones:
        return None
    points = [e.vector for e in open_ones]
    rank, distance = ranks([*points, *confirmed])[: len(points)], gaps(points, confirmed)
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
    """Distance of every point to the nearest confirmed one, summed over the objectives; infinite if none is confirmed.

    An objective's unit is the share of all points between two values, so that a few bad students do not stretch its scale.
    """
    ordered = [sorted(column) for column in zip(*points, *confirmed, strict=True)]

    def place(vector: Vector) -> list[float]:
        among = zip(vector, ordered, strict=True)
        return [(bisect_left(column, x) + bisect_right(column, x)) / (2 * len(column)) for x, column in among]

    taken = [place(vector) for vector in confirmed]
    return [
        min((sum(abs(a - b) for a, b in zip(place(vector), other, strict=True)) for other in taken), default=math.inf)
        for vector in points
    ]
