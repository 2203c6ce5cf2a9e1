"""The multiple-choice knapsack, exactly: one choice per item, least summed loss, summed cost within a capacity.

Dynamic programming over undominated (cost, loss) pairs (Nemhauser and Ullmann 1969) instead of over every capacity, because
costs are bits of whole matrices: few different sums exist. States that cannot beat a greedy answer are dropped by the bound of
the linear relaxation (Sinha and Zoltners 1979), which is tight, so 60 layers take milliseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Choices = Sequence[tuple[int, float]]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
TOLERANCE = 1e-9


def knapsack(items: Sequence[Choices], capacity: int) -> tuple[int, ...]:
    """Index of the choice (cost, loss) taken for every item, costs and losses not negative.

    Of the selections whose costs sum to at most `capacity` it has the least loss; among equals the least cost, among those the
    first in lexicographic order. Where none fits, it is the one of least cost (then loss, then order).
    """
    if any(not choices for choices in items):
        raise ValueError("every item must have at least one choice, but some have none")
    capacity = max(capacity, sum(min(cost for cost, _ in choices) for choices in items))
    relaxed = _Relaxation(items)
    best = relaxed.greedy(capacity)
    cost, loss, rank = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64)
    steps: list[tuple[Integers, Integers]] = []
    for i, choices in enumerate(items):
        n = len(choices)
        costs = (cost[:, None] + np.array([c for c, _ in choices], np.int64)).ravel()
        losses = (loss[:, None] + np.array([v for _, v in choices], np.float64)).ravel()
        keys = (rank[:, None] * n + np.arange(n)).ravel()
        hopeful = np.flatnonzero(relaxed.bound(i + 1, capacity - costs) + losses <= best)
        hopeful = hopeful[np.lexsort((keys[hopeful], losses[hopeful], costs[hopeful]))]
        below = np.minimum.accumulate(np.concatenate(([np.inf], losses[hopeful])))[:-1]
        kept = hopeful[losses[hopeful] < below]
        cost, loss = costs[kept], losses[kept]
        rank = np.argsort(np.argsort(keys[kept])).astype(np.int64)
        steps.append((kept // n, kept % n))
    taken, state = [], len(cost) - 1  # costs ascend and losses descend: the last one has the least loss
    for parents, choice in reversed(steps):
        taken.append(int(choice[state]))
        state = int(parents[state])
    return tuple(reversed(taken))


@dataclass(frozen=True)
class _Step:
    """An edge of an item's lower convex hull: what more bits buy."""

    item: int
    cost: int
    gain: float


class _Relaxation:
    """The problem with fractions of choices allowed, whose optimum takes the hulls' edges by gain per cost."""

    def __init__(self, items: Sequence[Choices]) -> None:
        bases, steps = zip(*(_hull(i, choices) for i, choices in enumerate(items)), strict=True) if items else ((), ())
        self.steps = sorted((s for found in steps for s in found), key=lambda s: (-s.gain / s.cost, s.item, s.cost))
        self.cheapest = np.array([*np.cumsum([c for c, _ in bases][::-1])[::-1], 0], np.int64)
        self.loss = np.array([*np.cumsum([v for _, v in bases][::-1])[::-1], 0.0])
        self._curves = [self._curve(i) for i in range(len(items) + 1)]

    def bound(self, first: int, room: Integers) -> Floats:
        """The least loss of the items from `first` on within `room` bits, relaxed; infinite where not even the cheapest fit."""
        spent, gained = self._curves[first]
        left = room - self.cheapest[first]
        found = self.loss[first] - np.interp(left, spent, gained)
        return np.asarray(np.where(left < 0, np.inf, found))

    def greedy(self, capacity: int) -> float:
        """Loss of a selection that fits, a little raised, so that equals of the best one are kept."""
        left, loss, closed = capacity - int(self.cheapest[0]), float(self.loss[0]), set[int]()
        for step in self.steps:
            if step.item in closed or step.cost > left:
                closed.add(step.item)  # the later edges of a hull build on the earlier ones
            else:
                left, loss = left - step.cost, loss - step.gain
        return loss + TOLERANCE * max(float(self.loss[0]), 1e-300)

    def _curve(self, first: int) -> tuple[Floats, Floats]:
        steps = [s for s in self.steps if s.item >= first]
        spent = np.cumsum([0.0, *(s.cost for s in steps)])
        return spent, np.cumsum([0.0, *(s.gain for s in steps)])


def _hull(item: int, choices: Choices) -> tuple[tuple[int, float], list[_Step]]:
    """The cheapest choice and the edges of the lower convex hull from there to the least loss."""
    points: list[tuple[int, float]] = []
    for cost, loss in sorted(choices):
        if points and loss >= points[-1][1]:
            continue
        while len(points) > 1 and _above(points[-2], points[-1], (cost, loss)):
            points.pop()
        points.append((cost, loss))
    edges = itertools.pairwise(points)
    return points[0], [_Step(item, b[0] - a[0], a[1] - b[1]) for a, b in edges]


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
