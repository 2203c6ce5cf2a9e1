"""A study as seen from the profile that a question names: the searched one, a kept target, or one predicted on the fly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.common.command_line import pasted
from paretune.common.errors import NothingFeasible
from paretune.search.study.target_records import Target
from paretune.search.study.target_view import view_on
from paretune.search.study.view import Point, StudyView

if TYPE_CHECKING:
    from paretune.search.targets.profiles import Predict


@dataclass(frozen=True)
class Answer:
    """The study on one profile; `target` is None for the searched one, `kept` whether the study holds its rows;
    `asked` is how the profile was named: a name or a YAML file."""

    view: StudyView
    name: str
    target: Target | None
    kept: bool = True
    asked: str = ""

    def sentence(self, chosen: Point) -> str:
        """Where the costs of a candidate come from."""
        if self.target is None:
            return ""
        row = self.target.rows[chosen.key]
        how = "measured" if row.measurements[self.view.figures.latency].provenance == "measured" else "predicted"
        study = self.view.study
        home = self.view.folder.parent.parent
        keeps = pasted("targets", study, "--profile", self.asked or self.name, home=home)
        later = "" if self.kept else f" on the fly; `{keeps}` keeps them"
        return f"costs on {self.name} are {how}{later}"


def answer_on(view: StudyView, profile: str | None, home: Path, predict: Predict | None = None) -> Answer:
    """The study on `profile` (a name or a YAML file; None: the searched one).

    A kept target is taken by its name as it was kept, if some were measured or it covers all confirmed
    candidates; a YAML file is that target if it says the same. Raises UsageError for an unknown
    profile or a plug-in, NothingFeasible if no candidate runs there.
    """
    own = str((view.meta.get("profile") or {}).get("name", ""))
    if profile is None or profile == own:
        return Answer(view, own, None)
    found = next((t for t in view.targets if t.name == profile and _serves(t, view)), None)
    if found is None:
        from paretune.search.targets.profiles import further_profiles  # late: the usual question needs none of it
        from paretune.search.targets.targets import predict_target

        (loaded,) = further_profiles("", (profile,), view.meta["spec"]["teacher"], home)
        if loaded.name == own and loaded.model_dump(mode="json") == view.meta["profile"]:
            return Answer(view, own, None)
        same = (t for t in view.targets if t.profile == loaded.model_dump(mode="json") and _serves(t, view))
        found = next(same, None)
    kept = found is not None
    if found is None:
        found = predict_target(view, loaded, predict)
    there = view_on(view, found)
    if view.confirmed and not there.confirmed:
        reasons = sorted(set(found.infeasible.values()))
        raise NothingFeasible(
            f"no confirmed candidate runs on {found.name}: {reasons[0] if reasons else 'its costs are not known'}",
            "search with it as the first --profile, or take another target",
        )
    return Answer(there, found.name, found, kept, profile)


def _serves(target: Target, view: StudyView) -> bool:
    """Whether its rows answer: some were measured, or every confirmed candidate has one."""
    return target.measured > 0 or all(p.key in target.rows for p in view.confirmed)
