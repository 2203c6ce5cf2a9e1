"""What it costs to take, on one target, the candidate that is best on another: the cross-target regret matrix. Pure.

Given are costs per target and candidate (any quantity that is minimized, such as ms/token) and the quality loss of every
candidate. At a loss limit L, the choice of target A is the candidate of least cost on A among those that lose at most L
(ties: less loss, then the smaller key). The regret of A's choice on B is

    regret(A, B) = cost of A's choice on B / least cost on B of any candidate that loses at most L, minus 1,

so the diagonal is 0 and nothing is negative. It is `INFEASIBLE` (infinite) where A's choice cannot run on B though another
candidate can, and None where a cost that it needs is not known, or nothing runs on A or B within L. The worst regret of a
candidate is its largest over all targets on which something runs; the robust candidate is the one whose worst regret is
smallest (ties: smaller sum of regrets, less loss, smaller key). This is regret in the sense of Savage (1951), "The theory
of statistical decision", relative instead of absolute because milliseconds of a board and of a data centre do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

INFEASIBLE = math.inf
LOSS_LIMITS = (0.01, 0.03, 0.10)
Costs = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Robust:
    """A candidate that serves every target: its key, its worst relative regret (0 or more), and the target where that is."""

    key: str
    worst: float
    where: str


@dataclass(frozen=True)
class Regret:
    """The matrix at one loss limit. `choices[A]` is the key that A would take (None: nothing runs there within the limit);
    `matrix[A][B]` the relative regret of that choice on B; `best[B]` the least cost on B."""

    limit: float
    targets: tuple[str, ...]
    choices: dict[str, str | None]
    best: dict[str, float]
    matrix: dict[str, dict[str, float | None]]
    robust: Robust | None


def regret_matrix(costs: Costs, losses: Mapping[str, float], limit: float = INFEASIBLE) -> Regret:
    """The matrix among candidates whose loss (a fraction) is at most `limit`.

    `costs[target][key]` is positive, `INFEASIBLE` where the candidate cannot run on that target; a key that is missing is
    not known there. Targets keep their order. Raises ValueError for a cost that is not positive or a candidate without loss.
    """
    _check(costs, losses)
    inside = {t: {k: c for k, c in row.items() if losses[k] <= limit} for t, row in costs.items()}
    choices = {t: _choice(row, losses) for t, row in inside.items()}
    best = {t: inside[t][key] for t, key in choices.items() if key is not None}
    matrix = {
        a: {b: None if key is None else _regret(inside[b], key, best.get(b)) for b in inside}
        for a, key in choices.items()
    }
    return Regret(limit, tuple(costs), choices, best, matrix, _robust(inside, best, losses))


def _check(costs: Costs, losses: Mapping[str, float]) -> None:
    for target, row in costs.items():
        for key, cost in row.items():
            if not cost > 0:
                raise ValueError(f"a cost must be positive, but {key} on {target} got {cost}")
            if key not in losses:
                raise ValueError(f"every candidate must have a loss, but {key} on {target} has none")


def _choice(row: Mapping[str, float], losses: Mapping[str, float]) -> str | None:
    runs = [key for key, cost in row.items() if cost < INFEASIBLE]
    return min(runs, key=lambda key: (row[key], losses[key], key), default=None)


def _regret(row: Mapping[str, float], key: str, best: float | None) -> float | None:
    if best is None or key not in row:
        return None
    return row[key] / best - 1.0


def _robust(inside: Costs, best: Mapping[str, float], losses: Mapping[str, float]) -> Robust | None:
    """Only candidates whose cost is known on every target where something runs, and that run on all of these."""
    found = []
    known = set.intersection(*(set(inside[t]) for t in best)) if best else set()
    for key in known:
        regrets = {t: inside[t][key] / best[t] - 1.0 for t in best}
        where = max(regrets, key=lambda t: regrets[t])
        if regrets[where] < INFEASIBLE:
            found.append((regrets[where], sum(regrets.values()), losses[key], key, where))
    if not found:
        return None
    worst, _, _, key, where = min(found)
    return Robust(key, worst, where)
