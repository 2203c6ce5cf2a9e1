"""The Python interface: run a search, open a study, take tables, recommendations and artifacts from it.

It does what the command line does, with the same promises; heavy libraries are imported by the calls that need them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.common.command_line import use_home, usual_home
from paretune.common.errors import EnvironmentProblem, NothingFeasible, UsageError

if TYPE_CHECKING:
    import pandas

    from paretune.search.recommend.advice import Advice
    from paretune.search.study.view import Point, StudyView


def search(
    spec: str | os.PathLike[str] | None = None,
    *,
    study: str | None = None,
    preset: str | None = None,
    home: str | os.PathLike[str] | None = None,
    address: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> Study:
    """Search, or continue an interrupted search, and return its study; `settings` are those of a search's file (budget="9m",
    teacher=…, targets=[…], limits={…}), over those of the file `spec`.

    It takes the budget's time. The study is on the disk all the while: Ctrl-C ends it in good order, the same call goes on.
    `progress` False is silent. Raises UsageError, EnvironmentProblem; NothingFeasible if nothing could be confirmed.
    """
    from paretune.cli.commands.search import run_search, why_ended
    from paretune.cli.terminal.console import talk
    from paretune.search.prepare.prepare import prepare
    from paretune.search.spec import make_spec

    folder = _home(home)
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    ready = prepare(make_spec(None if spec is None else Path(spec), preset, options), folder, address)
    began: list[str] = []
    quiet, talk.quiet = talk.quiet, talk.quiet or not progress
    try:
        command = call_of("paretune.search", spec, study=study, preset=preset, home=home, address=address, **settings)
        code = run_search(ready, folder, study, address, json=False, tell=began.append, output=False, command=command)
    finally:
        talk.quiet = quiet
    found = Study(began[0], folder)
    for kind in (UsageError, NothingFeasible, EnvironmentProblem):
        if code == kind.exit_code:
            raise kind(*why_ended(found.view, code))
    return found


def call_of(function: str, *arguments: Any, **named: Any) -> str:
    """The Python call that made a study, for its report."""
    plain = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in named.items() if v is not None}
    told = [repr(os.fspath(a) if isinstance(a, os.PathLike) else a) for a in arguments if a is not None]
    told += [f"{name}={value!r}" for name, value in plain.items()]
    return f"{function}({', '.join(told)})"


def open_study(study: str | None = None, home: str | os.PathLike[str] | None = None) -> Study:
    """A study by its id, the one written last without one; also while a search runs on it. Raises UsageError if there is none."""
    from paretune.cli.terminal.options import study_folder
    from paretune.search.study.database import require_study

    folder = study_folder(study, _home(home))
    require_study(folder)
    return Study(folder.name, _home(home))


def studies(home: str | os.PathLike[str] | None = None) -> pandas.DataFrame:
    """All studies of a home, the one written last first: a row each, indexed by id."""
    import pandas as pd

    paths = sorted((_home(home) / "studies").glob("*/study.db"), key=lambda p: p.stat().st_mtime, reverse=True)
    rows = [{"study": p.parent.name, **Study(p.parent.name, _home(home)).status()} for p in paths]
    return pd.DataFrame(rows).set_index("study") if rows else pd.DataFrame()


@dataclass(frozen=True)
class Study:
    """A study of a home, read anew with every call, so that it is as fresh as its search. Never writes."""

    name: str
    home: Path

    @property
    def folder(self) -> Path:
        """The study's folder in its home."""
        return self.home / "studies" / self.name

    @property
    def view(self) -> StudyView:
        """Everything that the store says, as values."""
        from paretune.search.study.store import Store
        from paretune.search.study.view import load_view

        store = Store.reader(self.folder)
        try:
            return load_view(store)
        finally:
            store.close()

    def status(self) -> dict[str, Any]:
        """How it stands: state, seconds, counts."""
        from paretune.cli.commands.study import status_of

        return {name: v for name, v in status_of(self.view).items() if name != "study"}

    def front(self, profile: str | None = None) -> pandas.DataFrame:
        """The confirmed candidates that nothing dominates, best quality first; `profile` is another target, whose costs are kept
        or predicted. A row per candidate, indexed by its key (columns: `_table`)."""
        view = self._on(profile)
        table = _table(view.front)
        table["tied_with"] = [view.ties.get(p.key) for p in view.front]
        return table

    def candidates(self, kind: str = "confirmed") -> pandas.DataFrame:
        """All candidates of a kind: "confirmed" (measured) or "rung0" (estimates). Raises UsageError."""
        if kind not in ("confirmed", "rung0"):
            raise UsageError(f"a kind is 'confirmed' or 'rung0', but got {kind!r}", "choose one of them")
        view = self.view
        return _table(view.confirmed if kind == "confirmed" else view.rung0)

    def targets(self, loss: float | None = None) -> pandas.DataFrame:
        """The regret matrix at a loss limit (a fraction; None: the one that reports show); empty for a single profile.

        An entry is the fraction by which the row's choice is slower on the column's target than that target's own.
        """
        import pandas as pd

        from paretune.search.recommend.compare import compare

        found = compare(self.view)
        if found is None:
            return pd.DataFrame()
        near = found.shown if loss is None else min(found.regrets, key=lambda r: abs(r.limit - loss))
        table = pd.DataFrame(near.matrix).T.reindex(index=list(near.targets), columns=list(near.targets))
        table.attrs["loss"] = near.limit
        return table

    def recommend(
        self,
        *,
        goal: str | None = None,
        profile: str | None = None,
        max_latency_ms: float | None = None,
        max_bytes: float | None = None,
        max_memory_bytes: float | None = None,
        max_loss: float | None = None,
        min_throughput: float | None = None,
        max_energy_j: float | None = None,
        max_cost_usd: float | None = None,
    ) -> Recommended:
        """The candidate to take, with reasons. `goal` is balanced, fastest, quality or smallest; `max_loss` a fraction.

        Raises NothingFeasible naming the nearest candidate if nothing keeps the limits, UsageError for one that cannot be.
        """
        from paretune.search.recommend.advice import advise
        from paretune.search.recommend.recommend import Limits

        limits = Limits(
            max_latency_ms, max_bytes, max_memory_bytes, max_loss, min_throughput, max_energy_j, max_cost_usd
        )
        found = advise(self.view, limits, goal, profile, self.home)
        if found.chosen is None:
            assert found.nearest is not None
            raise NothingFeasible(
                f"no front member keeps all limits; the nearest is {found.nearest.name}: {'; '.join(found.why)}",
                "relax that limit",
            )
        return Recommended(self, found)

    def export(self, key: str, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact of a confirmed candidate (its key, or the beginning of it) with HOW_TO_RUN.md into a new folder."""
        from paretune.search.recommend.export import export_artifact

        view = self.view
        point = view.point(key) if key else None
        if point is None:
            raise UsageError(f"no confirmed candidate's key begins with {key!r}", "take one from front()")
        return export_artifact(view, point, Path(folder))

    def report(self) -> Path:
        """Write report.html and front.png anew; the path of the report."""
        from paretune.tracking.report.report import write_report

        view = self.view
        write_report(view)
        return view.folder / "report.html"

    def chart(self) -> Any:
        """The front as a plotly Figure."""
        from paretune.tracking.charts.front import front_figure

        return front_figure(self.view)

    def _on(self, profile: str | None) -> StudyView:
        from paretune.search.recommend.answer import answer_on

        return answer_on(self.view, profile, self.home).view

    def _repr_html_(self) -> str:
        """What a notebook shows: how it stands, the recommendation, the front. Without scripts and without a network."""
        status = self.status()
        head = f"<b>{escape(self.name)}</b>: {escape(str(status['state']))}, {status['confirmed']} confirmed, front of {status['front']}"
        if not status["front"]:
            return f"<p>{head}</p>"
        return f"<p>{head}</p>{self.recommend()._repr_html_()}{_front_html(self.view)}"


@dataclass(frozen=True)
class Recommended:
    """A recommendation of a study; `advice` has everything that it says."""

    study: Study
    advice: Advice

    @property
    def key(self) -> str:
        """Key of the recommended candidate, 16 hex digits."""
        return self._point.key

    @property
    def name(self) -> str:
        """Short name of the recommended candidate, as tables show it."""
        return self._point.name

    @property
    def why(self) -> tuple[str, ...]:
        """The reasons for the recommendation, a phrase each."""
        return self.advice.why

    @property
    def artifact(self) -> Path:
        """Folder of the artifact inside the study."""
        return self.study.folder / "artifacts" / self.key

    def measurements(self) -> pandas.DataFrame:
        """A row per measurement: value, low, high, unit, provenance, samples, note."""
        import pandas as pd

        rows = {name: dataclasses.asdict(m) for name, m in self._point.measurements.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def to_dict(self) -> dict[str, Any]:
        """As `paretune recommend --json`."""
        return self.advice.to_dict()

    def export(self, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact with HOW_TO_RUN.md into a new folder."""
        return self.study.export(self.key, folder)

    @property
    def _point(self) -> Point:
        assert self.advice.chosen is not None
        return self.advice.chosen

    def __str__(self) -> str:
        return "\n".join([f"{self.name} ({self.key})", self._point.description, *(f"- {why}" for why in self.why)])

    def _repr_html_(self) -> str:
        more = [f"runner-up: {self.advice.price}"] if self.advice.price else []
        reasons = "".join(f"<li>{escape(text)}</li>" for text in [*self.why, *more])
        return f"<p>★ <b>{escape(self.name)}</b> <code>{self.key[:8]}</code>, {escape(self._point.description)}</p><ul>{reasons}</ul>"


def _table(points: Sequence[Point]) -> pandas.DataFrame:
    """name, source and description; then for every measurement NAME its value, and where it is no mere count NAME_low, NAME_high
    (95 % interval) and NAME_provenance. Units are those of the names: ms, bytes, nats per token, fractions."""
    import pandas as pd

    rows = [
        {"key": p.key, "name": p.name, "source": p.source, "description": p.description, **_cells(p)} for p in points
    ]
    return pd.DataFrame(rows).set_index("key") if rows else pd.DataFrame({"name": []}).rename_axis("key")


def _cells(point: Point) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for name, m in point.measurements.items():
        found[name] = m.value
        if m.low != m.high:
            found |= {f"{name}_low": m.low, f"{name}_high": m.high}
        found[f"{name}_provenance"] = m.provenance
    return found


def _front_html(view: StudyView) -> str:
    from paretune.tracking.wording import measurement, short_of, told, with_interval

    names = [n for n in told(view.figures) if all(measurement(p, n) is not None for p in view.front)]
    head = "".join(f"<th>{escape(text)}</th>" for text in ("candidate", *map(short_of, names)))
    rows = []
    for p in view.front:
        cells = "".join(f"<td>{escape(with_interval(n, measurement(p, n)))}</td>" for n in names)
        rows.append(f"<tr><td>{escape(p.name)} <code>{p.key[:8]}</code></td>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _home(home: str | os.PathLike[str] | None) -> Path:
    """As the command line: the argument, else PARETUNE_HOME, else ./mlruns."""
    return use_home(usual_home() if home is None else Path(home).resolve())
