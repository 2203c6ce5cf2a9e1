"""From a front and limits to one candidate, with reasons: what binds, the runner-up and its price."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paretune.common.errors import NothingFeasible, UsageError
from paretune.objectives.directions import excess
from paretune.objectives.energy import COST, ENERGY, NEEDED, THROUGHPUT
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import DECODER, MetricNames
from paretune.objectives.units import plain
from paretune.search.study.view import LABELS, Point, StudyView, label_of, tied

GOALS = ("balanced", "fastest", "quality", "smallest")
Order = Callable[[Point], float]


@dataclass(frozen=True)
class Limits:
    """Upper bounds, and the least throughput; None leaves a quantity free. `loss` is the NLL increase over the fp32 teacher as
    a fraction, `energy_j` is per token, `cost_usd` per million tokens."""

    latency_ms: float | None = None
    compressed_bytes: float | None = None
    memory_bytes: float | None = None
    loss: float | None = None
    throughput: float | None = None
    energy_j: float | None = None
    cost_usd: float | None = None

    def active(self, figures: MetricNames = DECODER) -> dict[str, float]:
        """Measurement name to bound, for the bounds that are set. Raises UsageError if one is not a positive number."""
        named = {
            figures.latency: self.latency_ms,
            "compressed_bytes": self.compressed_bytes,
            "peak_memory_bytes": self.memory_bytes,
            "relative_loss": self.loss,
            THROUGHPUT: self.throughput,
            ENERGY: self.energy_j,
            COST: self.cost_usd,
        }
        found = {name: value for name, value in named.items() if value is not None}
        for name, value in found.items():
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(
                    f"a limit must be positive and finite, but {name} got {value}", "give one, or leave it out"
                )
        return found


@dataclass(frozen=True)
class Recommendation:
    """`chosen` with the sentences of `why`; `binding` is the limit that has the least room; `runner_up` with its price."""

    chosen: Point
    why: tuple[str, ...]
    binding: str | None
    runner_up: Point | None
    price: str
    considered: int

    def to_dict(self) -> dict[str, Any]:
        """Return the recommendation as JSON-able data."""
        return {
            "chosen": point_dict(self.chosen),
            "why": list(self.why),
            "binding": self.binding,
            "price": self.price,
            "considered": self.considered,
            "runner_up": None if self.runner_up is None else point_dict(self.runner_up),
        }


def recommend(view: StudyView, limits: Limits, goal: str | None = None) -> Recommendation:
    """The best candidate of the front within the limits, by `goal` or, without one, by what they suggest (`ranking`).

    Raises NothingFeasible naming the nearest candidate and by how much it misses.
    """
    if not view.front:
        raise why_empty(view)
    bounds = bounds_of(view, limits)
    order, rule = ranking(view, bounds, goal)
    feasible = sorted(within(view.front, bounds), key=order)
    if not feasible:
        raise _nearest(view, bounds)
    return pick(view, feasible, bounds, rule)


def bounds_of(view: StudyView, limits: Limits) -> dict[str, float]:
    """Measurement name to bound: those of the search's settings, and the given ones instead. Raises UsageError."""
    spec_limits: dict[str, float] = (view.meta.get("spec") or {}).get("limits") or {}
    bounds = {
        **{n: v for n, v in spec_limits.items() if n in LABELS or n == view.figures.latency},
        **limits.active(view.figures),
    }
    _require_known(view, bounds)
    return bounds


def within(points: Sequence[Point], bounds: Mapping[str, float]) -> list[Point]:
    """The points that keep all bounds."""
    return [p for p in points if all(_excess(p, name, bound) <= 0 for name, bound in bounds.items())]


def pick(view: StudyView, ranked: Sequence[Point], bounds: dict[str, float], rule: str) -> Recommendation:
    """The first of the feasible members `ranked`, with reasons."""
    chosen, runner_up = ranked[0], (ranked[1] if len(ranked) > 1 else None)
    binding = _binding(chosen, bounds)
    why = [f"{rule} {_among(view, ranked, bounds)}", *_sentences(view, chosen)]
    if binding is not None:
        room = -_excess(chosen, binding, bounds[binding])
        why.append(
            f"the tightest limit is {binding}: {_show(binding, chosen.measurements[binding])} "
            f"of {plain(binding, bounds[binding], chosen.measurements[binding].unit)} ({room:.0%} room)"
        )
    price = "" if runner_up is None else chosen_price(view, chosen, runner_up)
    return Recommendation(chosen, tuple(why), binding, runner_up, price, len(ranked))


def why_empty(view: StudyView) -> NothingFeasible:
    """Why a study has no front: nothing is confirmed, or nothing was measured in peace."""
    if not view.confirmed:
        return NothingFeasible(
            "the study has no confirmed candidate yet",
            "wait for the first confirmation, or search with a larger budget",
        )
    return NothingFeasible(
        f"the front is empty because all {len(view.confirmed)} confirmed candidates were disturbed while they were measured: "
        "something else used the CPUs of the latency benchmark",
        "end that work, then search again; the elastic student and every undisturbed measurement are kept",
    )


def point_dict(point: Point) -> dict[str, Any]:
    """A point as JSON-able data."""
    return {
        "key": point.key,
        "name": point.name,
        "description": point.description,
        "source": point.source,
        "kind": point.kind,
        "measurements": {name: m.to_dict() for name, m in point.measurements.items()},
        **{name: point.facts[name] for name in ("qat", "qat_reason") if name in point.facts},
    }


def _excess(point: Point, name: str, bound: float) -> float:
    return excess(name, point.measurements[name].value, bound)


def _require_known(view: StudyView, bounds: dict[str, float]) -> None:
    """Raises UsageError for a limit on what this study has not measured: its profile has no power or price, or it is older."""
    for name in bounds:
        if any(name not in p.measurements for p in view.front):
            needed = f": its profile has no {NEEDED[name]}" if name in NEEDED else ""
            raise UsageError(
                f"a limit needs its measurement, but the front of {view.study} has no {name}{needed}",
                "leave that limit out, or search again with a profile that has it",
            )


def _among(view: StudyView, feasible: Sequence[Point], bounds: dict[str, float]) -> str:
    if not bounds:
        return f"of the {len(view.front)} front members"
    if len(feasible) == 1:
        return f"because it is the only one of {len(view.front)} front members within the limits"
    return f"of the {len(feasible)} front members (of {len(view.front)}) within the limits"


def ranking(view: StudyView, bounds: Mapping[str, float], goal: str | None = None) -> tuple[Order, str]:
    """What to sort front members by, best first, and its name. Without a goal: the fastest where only the loss is limited,
    the lowest loss under other limits, else the best balance (smallest sum of ratios to the best in each objective, the
    quality's to the tenth power). Raises UsageError for an unknown goal."""
    if goal is not None and goal not in GOALS:
        near = difflib.get_close_matches(goal, GOALS, 1)
        raise UsageError(
            f"a goal is one of {', '.join(GOALS)}, but got {goal!r}",
            f"did you mean {near[0]}?" if near else "choose one",
        )
    if goal is None:
        goal = "balanced" if not bounds else "fastest" if set(bounds) == {"relative_loss"} else "quality"
    if goal == "balanced":
        return _balance(view), "the best balance"
    name, rule = {
        "fastest": (view.figures.latency, "the fastest"),
        "quality": (view.figures.quality, "the lowest loss"),
        "smallest": ("compressed_bytes", "the smallest"),
    }[goal]
    return (lambda p: p.measurements[name].value), rule


def _balance(view: StudyView) -> Order:
    best = [min(values) for values in zip(*(p.vector(view.objectives) for p in view.front), strict=True)]

    def balance(point: Point) -> float:
        values = zip(view.objectives, point.vector(view.objectives), best, strict=True)
        ratios = {name: 1 + (v - b) / (abs(b) or 1.0) for name, v, b in values}  # a plug-in's quality can be negative
        return float(ratios.pop(view.figures.quality) ** 10 + sum(ratios.values()))

    return balance


def _sentences(view: StudyView, chosen: Point) -> Sequence[str]:
    figures, latency = view.figures, view.figures.latency
    quality = "NLL" if figures.is_decoder else figures.quality.replace("_", " ")
    verb = "decodes" if figures.is_decoder else "runs"
    found = [
        f"{quality} {_show(figures.quality, chosen.measurements[figures.quality])}, "
        f"{chosen.measurements['relative_loss'].value:+.1%} against the fp32 teacher "
        f"({chosen.measurements['relative_loss'].low:+.1%} … {chosen.measurements['relative_loss'].high:+.1%})"
    ]
    teacher = view.teacher
    if teacher is not None and teacher.key != chosen.key:
        speed = teacher.measurements[latency].value / chosen.measurements[latency].value
        size = teacher.measurements["compressed_bytes"].value / chosen.measurements["compressed_bytes"].value
        found.append(
            f"{verb} {speed:.2f} times as fast ({_show(latency, chosen.measurements[latency])}) "
            f"and is {size:.2f} times smaller ({_show('compressed_bytes', chosen.measurements['compressed_bytes'])} compressed)"
        )
    return found


def _binding(chosen: Point, bounds: dict[str, float]) -> str | None:
    return max(bounds, key=lambda name: _excess(chosen, name, bounds[name])) if bounds else None


def chosen_price(view: StudyView, chosen: Point, other: Point) -> str:
    """What taking `other` instead would change, objective by objective."""
    parts = []
    for name in view.objectives:
        mine, theirs = chosen.value(name), other.value(name)
        if tied(chosen, other, name):
            parts.append(f"{label_of(name, view.figures)} tied")
        else:
            parts.append(
                f"{label_of(name, view.figures)} {(theirs.value - mine.value) / (abs(mine.value) or 1.0):+.1%}"
            )
    return f"{other.name} instead: " + ", ".join(parts)


def _nearest(view: StudyView, bounds: dict[str, float]) -> NothingFeasible:
    def excess(point: Point) -> float:
        return sum(max(0.0, _excess(point, name, bound)) for name, bound in bounds.items())

    near = min(view.front, key=excess)
    missed = [
        f"{name} is {_show(name, near.measurements[name])}, the limit {plain(name, bound, near.measurements[name].unit)}"
        for name, bound in bounds.items()
        if _excess(near, name, bound) > 0
    ]
    return NothingFeasible(
        f"no front member keeps all limits; the nearest is {near.name} ({near.key[:8]}): {'; '.join(missed)}",
        "relax that limit",
    )


def _show(name: str, m: Measurement) -> str:
    return plain(name, m.value, m.unit) + ("" if m.provenance == "measured" else f" ({m.provenance})")
