"""The command that adds further targets to a study, and the tables that hold targets side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.terminal.console import note, print_json, say, screen, talk
from paretune.cli.terminal.options import HOME, Home, Json, Study, opened_view, study_folder
from paretune.cli.terminal.table import Column, FittedTable
from paretune.common.command_line import pasted

if TYPE_CHECKING:
    from rich.console import Console

    from paretune.objectives.measurement import Measurement
    from paretune.search.recommend.compare import Comparison
    from paretune.search.recommend.regret import Regret
    from paretune.search.study.view import StudyView


def targets(
    study: Study = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="A target to add: a name or a YAML file. Repeat it to add several.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds to measure on local targets; 0 predicts only.")
    ] = 300.0,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Show a study on several targets: a front and a recommendation for each, and the regret of using it on another.

    Quality is not taken again. A target that is at hand is measured on the members of the fronts, others are predicted.
    """
    from paretune.search.recommend.compare import compare, comparison_dict

    if profile:
        _add(study_folder(study, home), home.resolve(), profile, seconds)
    with opened_view(study, home) as view:
        found = compare(view)
        if json:
            print_json({"study": view.study, "targets": [], "regret": []} if found is None else comparison_dict(found))
        elif found is None:
            more = pasted("targets", view.study, "--profile", "NAME", home=home)
            say(f"{view.study} has no further targets: add one with `{more}`")
        else:
            print_comparison(found, screen())


def _add(folder: Path, home: Path, names: list[str], seconds: float) -> None:
    """Add targets to a study that no search runs on, and bring report and MLflow up to date."""
    from paretune.common.errors import NothingFeasible
    from paretune.search.study.store import Store
    from paretune.search.study.view import load_view
    from paretune.search.targets.profiles import further_profiles
    from paretune.search.targets.targets import add_targets
    from paretune.tracking.mlflow.housekeeper import Housekeeper

    store = Store.open_study(folder)
    try:
        view = load_view(store)
        if not view.confirmed:
            raise NothingFeasible(
                "the study has no confirmed candidate yet, so nothing can be priced", "wait for the first confirmation"
            )
        profiles = further_profiles(view.meta["profile"]["name"], names, view.meta["spec"]["teacher"], home)
        add_targets(store, home, profiles, seconds)
        left = Housekeeper(store, home).finish()
        if left:
            note(left)
    finally:
        store.close()


def show_targets(view: StudyView) -> None:
    """On stderr after a search; nothing for a study without further targets."""
    from paretune.search.recommend.compare import compare

    found = compare(view)
    if found is not None:
        print_comparison(found, talk)


def print_comparison(found: Comparison, console: Console) -> None:
    """The targets, the matrix at one loss limit, and the candidate that serves all."""
    regret = found.shown
    console.print(_targets_table(found, regret))
    console.print(_matrix_table(found, regret))
    console.print(robust_sentence(found, regret), soft_wrap=True)
    for side in found.sides:
        for told in side.notes:
            note(f"{side.name}: {told}")
        for reason in sorted(set(side.infeasible.values()))[:3]:
            note(f"{side.name}: {reason}")


def robust_sentence(found: Comparison, regret: Regret) -> str:
    """Which candidate has the smallest worst regret."""
    if regret.robust is None:
        return f"no candidate within {regret.limit:.0%} loss has a known cost on every target"
    best = regret.robust
    name = found.point(best.key).name
    return f"smallest worst regret: {name} ({best.key[:8]}), at most {best.worst:+.1%} ({best.where})"


def _targets_table(found: Comparison, regret: Regret) -> FittedTable:
    title = f"fastest within {regret.limit:.0%}"
    columns = (
        Column("target", right=False, folds=True),
        Column("measured", rank=4),
        Column("predicted", rank=5),
        Column("cannot run", rank=6),
        Column("front", rank=3),
        Column("recommended", right=False, folds=True, rank=2),
        Column(title, right=False),
        Column("its decode ms", rank=1),
    )
    rows = []
    for side in found.sides:
        key, chosen, points = regret.choices[side.name], side.recommended(), side.view.confirmed
        predicted = sum(side.provenance(p.key) == "predicted" for p in points)
        point = None if key is None else side.view.point(key)
        rows.append(
            (
                side.name,
                str(side.measured),
                str(predicted),
                str(len(side.infeasible)),
                str(len(side.view.front) - len(side.view.ties)),
                "none" if chosen is None else chosen.chosen.name,
                "none" if point is None else point.key[:8],
                "-" if point is None else _cost(point.measurements[side.view.figures.latency]),
            )
        )
    return FittedTable(columns, tuple(rows), f"{found.view.study}: targets")


def _cost(m: Measurement) -> str:
    """Value and interval, which is lopsided where it follows from priors."""
    mark = "" if m.provenance == "measured" else f" {m.provenance}"
    return f"{m.value:.3f} [{m.low:.3f} … {m.high:.3f}]{mark}"


def _matrix_table(found: Comparison, regret: Regret) -> FittedTable:
    columns = (
        Column("choice of \\ runs on", right=False, folds=True),
        *(Column(name, rank=place) for place, name in enumerate(regret.targets)),
    )
    rows = tuple((a, *(_cell(found, regret, a, b) for b in regret.targets)) for a in regret.targets)
    caption = "more time per token than the target's own choice; p: predicted"
    return FittedTable(columns, rows, f"regret within {regret.limit:.0%} loss", caption)


def _cell(found: Comparison, regret: Regret, a: str, b: str) -> str:
    value = regret.matrix[a][b]
    if value is None:
        return "?"
    if value == float("inf"):
        return "cannot run"
    return f"{value:+.1%}" + (" p" if found.origin(regret, a, b) == "predicted" else "")
