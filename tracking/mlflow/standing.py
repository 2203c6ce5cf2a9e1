"""Where each candidate of a study stands on each target: tags to filter by, and metrics of the further targets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from paretune.search.recommend.compare import Side, compare
from paretune.search.recommend.recommend import Recommendation
from paretune.search.study.view import StudyView
from paretune.tracking.wording import named, recommended


@dataclass(frozen=True)
class Standing:
    """All targets of a study, the searched one first, each with its recommendation (None where nothing runs)."""

    sides: tuple[Side, ...]
    choices: tuple[Recommendation | None, ...]

    @classmethod
    def of(cls, view: StudyView) -> Standing:
        """Return how the study's candidates stand on each of its targets."""
        found = compare(view)
        sides = (Side(named(view.meta.get("profile")), view, None),) if found is None else found.sides
        return cls(sides, (recommended(view), *(side.recommended() for side in sides[1:])))

    @property
    def chosen(self) -> Recommendation | None:
        """The answer for the profile that was searched."""
        return self.choices[0]

    def fronts(self, key: str) -> list[str]:
        """Names of the targets on whose front a candidate is."""
        return [side.name for side in self.sides if any(p.key == key for p in side.view.front)]

    def recommendations(self, key: str) -> list[str]:
        """Names of the targets for which it is recommended."""
        pairs = zip(self.sides, self.choices, strict=True)
        return [side.name for side, found in pairs if found is not None and found.chosen.key == key]

    def tags(self, key: str) -> dict[str, str]:
        """`pareto` and `recommended` speak of the searched profile; lists of all targets only where there are several."""
        own = self.sides[0].name
        fronts, wanted = self.fronts(key), self.recommendations(key)
        found = {"pareto": _flag(own in fronts), "recommended": _flag(own in wanted)}
        if len(self.sides) > 1:
            found |= {"pareto_on": ", ".join(fronts) or "none", "recommended_for": ", ".join(wanted) or "none"}
        return found

    def metrics(self, key: str) -> dict[str, float]:
        """`<target>/<latency>` on the further targets where it runs; MLflow draws a section of charts per target. One figure
        each, for studies have many targets; the rest is in the table of targets."""
        found = {}
        for side in self.sides[1:]:
            point, name = side.view.point(key), side.view.figures.latency
            if point is not None:
                found[metric_of(side.name, name)] = float(f"{point.measurements[name].value:.6g}")
        return found


def metric_of(target: str, name: str) -> str:
    """Name of a further target's metric, within the letters that MLflow allows."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', target)}/{name}"


def _flag(value: bool) -> str:
    return "true" if value else "false"
