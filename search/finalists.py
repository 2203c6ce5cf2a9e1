"""Which explored candidates deserve recovery and confirmation: round-robin over strata, the best of each by rank and crowding.

A stratum is a sparsity pattern with a layer precision. Strata that reach the estimated front come first in every round;
every other stratum is visited once, so that the calibration learns what recovery does for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from paretune.search.front import Vector, crowding, ranks


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
    rank, distance = ranks([*points, *confirmed])[: len(points)], crowding(points)
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
