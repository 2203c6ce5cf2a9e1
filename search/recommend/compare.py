"""A study's targets side by side: every target's front and choice, the regret matrices, the candidate that serves all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paretune.common.errors import NothingFeasible
from paretune.search.recommend.recommend import Limits, Recommendation, recommend
from paretune.search.recommend.regret import INFEASIBLE, LOSS_LIMITS, Regret, regret_matrix
from paretune.search.study.target_records import Target
from paretune.search.study.target_view import view_on
from paretune.search.study.view import Point, StudyView

Cell = Literal["measured", "predicted"]


@dataclass(frozen=True)
class Side:
    """One target: the study as it looks from there. `target` is None for the profile that was searched."""

    name: str
    view: StudyView
    target: Target | None

    @property
    def infeasible(self) -> dict[str, str]:
        """Why candidates cannot run here, by key."""
        return {} if self.target is None else self.target.infeasible

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know about this target; empty for the searched profile."""
        return () if self.target is None else self.target.notes

    @property
    def costs(self) -> dict[str, float]:
        """The latency by candidate key, infinite where it cannot run; a disturbed one is not known."""
        name = self.view.figures.latency
        known = {p.key: p.measurements[name] for p in self.view.confirmed}
        found = {key: m.value for key, m in known.items() if m.provenance != "disturbed"}
        return found | dict.fromkeys(self.infeasible, INFEASIBLE)

    @property
    def measured(self) -> int:
        """How many candidates have a measured latency here."""
        return sum(self.provenance(p.key) == "measured" for p in self.view.confirmed)

    def provenance(self, key: str) -> str:
        """Return the provenance of a candidate's latency, "infeasible" or "unknown" if it has none."""
        point = next((p for p in self.view.confirmed if p.key == key), None)
        if point is None:
            return "infeasible" if key in self.infeasible else "unknown"
        return point.measurements[self.view.figures.latency].provenance

    def recommended(self) -> Recommendation | None:
        """The balanced choice for this target; None where nothing runs."""
        try:
            return recommend(self.view, Limits())
        except NothingFeasible:
            return None


@dataclass(frozen=True)
class Comparison:
    """All targets of a study, the searched one first, and a regret matrix of the latency per loss limit."""

    view: StudyView
    sides: tuple[Side, ...]
    regrets: tuple[Regret, ...]

    def side(self, name: str) -> Side:
        """Return the target of that name. Raises StopIteration if there is none."""
        return next(s for s in self.sides if s.name == name)

    def point(self, key: str) -> Point:
        """The confirmed point of the study, with the searched profile's costs."""
        return next(p for p in self.view.confirmed if p.key == key)

    def origin(self, regret: Regret, a: str, b: str) -> Cell:
        """Provenance of a cell: "measured" only if both A's choice and B's own choice were measured on B."""
        used = {"unknown" if k is None else self.side(b).provenance(k) for k in (regret.choices[a], regret.choices[b])}
        return "measured" if used == {"measured"} else "predicted"

    @property
    def shown(self) -> Regret:
        """The matrix that pictures show: at 3 % loss, or the next limit at which every target has a choice."""
        tight = [r for r in self.regrets if r.limit >= 0.03]
        return next((r for r in tight if None not in r.choices.values()), self.regrets[-1])


def compare(view: StudyView, limits: Sequence[float] = LOSS_LIMITS) -> Comparison | None:
    """None for a study without further targets, or in which nothing is confirmed."""
    if not view.targets or not view.confirmed:
        return None
    own = (view.meta.get("profile") or {}).get("name", "searched")
    sides = (Side(own, view, None), *(Side(t.name, view_on(view, t), t) for t in view.targets))
    losses = {p.key: p.measurements["relative_loss"].value for p in view.confirmed}
    costs = {s.name: {k: c for k, c in s.costs.items() if k in losses} for s in sides}
    return Comparison(view, sides, tuple(regret_matrix(costs, losses, limit) for limit in limits))


def comparison_dict(found: Comparison) -> dict[str, Any]:
    """As JSON-able data; an infinite regret is the text "infeasible", one that is not known null."""
    return {
        "study": found.view.study,
        "cost": found.view.figures.latency,
        "targets": [_side_dict(side) for side in found.sides],
        "regret": [_regret_dict(found, regret) for regret in found.regrets],
    }


def _side_dict(side: Side) -> dict[str, Any]:
    chosen = side.recommended()
    return {
        "name": side.name,
        "searched": side.target is None,
        "measured": side.measured,
        "candidates": len(side.view.confirmed),
        "front": [p.key for p in side.view.front],
        "ties": side.view.ties,
        "costs": {
            p.key: {name: m.to_dict() for name, m in p.measurements.items() if _is_cost(side, name)}
            for p in side.view.confirmed
        },
        "infeasible": side.infeasible,
        "recommended": None if chosen is None else chosen.chosen.key,
        "notes": list(side.notes),
    }


def _is_cost(side: Side, name: str) -> bool:
    own = side.target.rows.values() if side.target is not None else ()
    return any(name in row.measurements for row in own) or name in (side.view.figures.latency, "peak_memory_bytes")


def _regret_dict(found: Comparison, regret: Regret) -> dict[str, Any]:
    def cell(value: float | None) -> float | str | None:
        return "infeasible" if value == INFEASIBLE else value

    robust = regret.robust
    return {
        "loss": regret.limit,
        "targets": list(regret.targets),
        "choices": regret.choices,
        "matrix": [[cell(regret.matrix[a][b]) for b in regret.targets] for a in regret.targets],
        "provenance": [[found.origin(regret, a, b) for b in regret.targets] for a in regret.targets],
        "robust": None
        if robust is None
        else {"key": robust.key, "name": found.point(robust.key).name, "worst": robust.worst, "where": robust.where},
    }
