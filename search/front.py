"""Dominance, ranks and ties. Everything is minimized; vectors are tuples of floats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Vector = tuple[float, ...]


def dominates(a: Vector, b: Vector) -> bool:
    """Whether `a` is at least as good everywhere and better somewhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def non_dominated(points: Sequence[Vector]) -> list[int]:
    """Indices of the points that no other dominates, in their order; equal points all stay, and so does one with a NaN.

    In lexicographic order only an earlier point can dominate a later one, and if any does, a non-dominated one does: n times the
    front's size instead of n squared.
    """
    odd = {i for i, p in enumerate(points) if any(x != x for x in p)}
    found: list[int] = []
    for i in sorted((i for i in range(len(points)) if i not in odd), key=lambda i: points[i]):
        if not any(dominates(points[j], points[i]) for j in reversed(found)):
            found.append(i)
    return sorted([*found, *odd])


def ranks(points: Sequence[Vector]) -> list[int]:
    """Non-dominated rank of every point, 0 for the front (Deb et al. 2002); one n x n comparison, then peeling."""
    if not points:
        return []
    values = np.array(points, dtype=float)
    no_worse = np.all(values[:, None] <= values[None], axis=2)
    beats = no_worse & ~no_worse.T
    found = np.full(len(points), -1)
    rank = 0
    while (found < 0).any():
        left = found < 0
        front = left & ~beats[left].any(axis=0)
        found[front] = rank
        rank += 1
    return [int(r) for r in found]


def hypervolume(points: Sequence[Vector], reference: Vector) -> float:
    """Volume that the points dominate below `reference`, any number of objectives (recursive slicing; small fronts only)."""
    inside = [p for p in points if all(x < r for x, r in zip(p, reference, strict=True))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    total = 0.0
    levels = sorted({p[-1] for p in inside})
    for level, upper in zip(levels, [*levels[1:], reference[-1]], strict=True):
        total += (upper - level) * hypervolume([p[:-1] for p in inside if p[-1] <= level], reference[:-1])
    return total
