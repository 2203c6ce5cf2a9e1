"""The recommendation as every door of the program gives it: command line, HTTP, page and Python.

It answers for a profile that was searched, kept or never looked at (search/recommend/answer.py), never raises because limits exclude
everything, and says what relaxing each limit by a tenth would buy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.objectives.directions import MAXIMIZED, excess
from paretune.objectives.units import plain
from paretune.search.recommend.answer import Answer, answer_on
from paretune.search.recommend.recommend import (
    GOALS,
    Limits,
    Recommendation,
    bounds_of,
    chosen_price,
    pick,
    point_dict,
    ranking,
    why_empty,
    within,
)
from paretune.search.study.view import Point, StudyView, label_of, tied

if TYPE_CHECKING:
    from paretune.search.targets.profiles import Predict

__all__ = ["GOALS", "RELAXED", "Advice", "Relaxed", "Unmet", "advise"]
RELAXED = 0.10


@dataclass(frozen=True)
class Relaxed:
    """What a limit `bound`, relaxed to `relaxed_to`, would change the choice to; `key` is None where nothing changes."""

    limit: str
    bound: float
    relaxed_to: float
    key: str | None
    name: str
    gain: str


@dataclass(frozen=True)
class Unmet:
    """A limit that the nearest point misses: its `value` there, and by how much as a fraction of the bound."""

    limit: str
    bound: float
    value: float
    excess: float


@dataclass(frozen=True)
class Advice:
    """`chosen` is None where nothing keeps all limits: then `unmet` tells by how much `nearest` misses them. `ties` are the
    keys of members within the limits whose intervals overlap the choice's in every objective."""

    answer: Answer
    goal: str | None
    limits: dict[str, float]
    rule: str
    chosen: Point | None
    why: tuple[str, ...]
    binding: str | None
    ties: tuple[str, ...]
    runner_up: Point | None
    price: str
    relaxed: tuple[Relaxed, ...]
    unmet: tuple[Unmet, ...]
    nearest: Point | None
    considered: int

    @property
    def provenance(self) -> str:
        """Provenance of what the choice (or nearest point) is judged by, such as "measured"; "mixed" if it differs."""
        point = self.chosen or self.nearest
        if point is None:
            return "measured"
        names = {self.answer.view.figures.latency, *self.answer.view.objectives, *self.limits}
        found = {point.measurements[name].provenance for name in names if name in point.measurements}
        return found.pop() if len(found) == 1 else "mixed"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data, the same for all who ask."""
        chosen = self.chosen
        return {
            "study": self.answer.view.study,
            "profile": self.answer.name,
            "goal": self.goal,
            "limits": self.limits,
            "feasible": chosen is not None,
            "rule": self.rule,
            "chosen": None if chosen is None else point_dict(chosen),
            "why": list(self.why),
            "binding": None if chosen is None or self.binding is None else self._binding(chosen, self.binding),
            "ties": list(self.ties),
            "runner_up": None if self.runner_up is None else point_dict(self.runner_up),
            "price": self.price,
            "relaxed": [r.__dict__ for r in self.relaxed],
            "unmet": [u.__dict__ for u in self.unmet],
            "nearest": None if self.nearest is None else point_dict(self.nearest),
            "provenance": self.provenance,
            "considered": self.considered,
            "artifact": None if chosen is None else str(self.answer.view.folder / "artifacts" / chosen.key),
        }

    def _binding(self, chosen: Point, name: str) -> dict[str, Any]:
        value, bound = chosen.measurements[name].value, self.limits[name]
        return {"limit": name, "bound": bound, "value": value, "room": -excess(name, value, bound)}


def advise(
    view: StudyView,
    limits: Limits,
    goal: str | None = None,
    profile: str | None = None,
    home: Path = Path("mlruns"),
    predict: Predict | None = None,
) -> Advice:
    """The candidate of the front to take. `goal` is one of GOALS, None: what the limits suggest (recommend.ranking).

    Raises UsageError for an unknown goal, limit or profile, NothingFeasible for a study without a front or a profile on which
    nothing runs; limits that nothing keeps are an answer, not an error.
    """
    answer = answer_on(view, profile, home, predict)
    there = answer.view
    if not there.front:
        raise why_empty(there)
    bounds = bounds_of(there, limits)
    order, rule = ranking(there, bounds, goal)
    feasible = sorted(within(there.front, bounds), key=order)
    if not feasible:
        near, unmet = _nearest(there, bounds)
        told = tuple(
            f"{u.limit} is {plain(u.limit, u.value)}, {u.excess:.1%} beyond {plain(u.limit, u.bound)}" for u in unmet
        )
        relaxed = _relaxations(there, bounds, None, order)
        return Advice(answer, goal, bounds, rule, None, told, None, (), None, "", relaxed, unmet, near, 0)
    found: Recommendation = pick(there, feasible, bounds, rule)
    chosen = found.chosen
    ties = tuple(p.key for p in feasible[1:] if all(tied(chosen, p, name) for name in there.objectives))
    told = (*found.why, *filter(None, [answer.sentence(chosen)]))
    relaxed = _relaxations(there, bounds, chosen, order)
    price = "" if found.runner_up is None else chosen_price(there, chosen, found.runner_up)
    return Advice(
        answer,
        goal,
        bounds,
        rule,
        chosen,
        told,
        found.binding,
        ties,
        found.runner_up,
        price,
        relaxed,
        (),
        None,
        len(feasible),
    )


def _relaxations(view: StudyView, bounds: dict[str, float], chosen: Point | None, order: Any) -> tuple[Relaxed, ...]:
    return tuple(_relaxation(view, bounds, name, chosen, order) for name in bounds)


def _relaxation(view: StudyView, bounds: dict[str, float], name: str, chosen: Point | None, order: Any) -> Relaxed:
    """The choice with one limit a tenth looser: upper limits grow, the least throughput falls."""
    bound = bounds[name]
    loose = bound * (1 - RELAXED if name in MAXIMIZED else 1 + RELAXED)
    found = within(view.front, {**bounds, name: loose})
    best = min(found, key=order, default=None)
    if best is None or (chosen is not None and best.key == chosen.key):
        return Relaxed(name, bound, loose, None, "", "nothing")
    if chosen is None:
        return Relaxed(name, bound, loose, best.key, best.name, f"{best.name} becomes possible")
    return Relaxed(name, bound, loose, best.key, best.name, _gain(view, chosen, best))


def _gain(view: StudyView, chosen: Point, best: Point) -> str:
    """The objectives in which `best` differs by more than its interval."""
    parts = []
    for name in view.objectives:
        mine, theirs = chosen.value(name).value, best.value(name).value
        if not tied(chosen, best, name):
            parts.append(f"{label_of(name, view.figures)} {(theirs - mine) / (abs(mine) or 1.0):+.1%}")
    return f"{best.name}: " + (", ".join(parts) or "tied in every objective")


def _nearest(view: StudyView, bounds: dict[str, float]) -> tuple[Point, tuple[Unmet, ...]]:
    """The front member with the smallest sum of excesses, and what it misses."""

    def missed(point: Point) -> Sequence[Unmet]:
        found = ((name, bound, point.measurements[name].value) for name, bound in bounds.items())
        all_of = (Unmet(name, bound, value, excess(name, value, bound)) for name, bound, value in found)
        return [u for u in all_of if u.excess > 0]

    near = min(view.front, key=lambda p: sum(u.excess for u in missed(p)))
    return near, tuple(missed(near))
