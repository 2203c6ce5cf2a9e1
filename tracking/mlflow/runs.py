"""The MLflow runs of one study: a parent, a child per confirmed candidate, and the registered model of its teacher."""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.search.study.store import Store
from paretune.search.study.view import Point, StudyView
from paretune.tracking.charts.front import figure_html
from paretune.tracking.charts.front_picture import front_png
from paretune.tracking.charts.targets_picture import targets_html
from paretune.tracking.mlflow.experiment import experiment_of
from paretune.tracking.mlflow.registry import ARTIFACT, Registry, quoted
from paretune.tracking.mlflow.standing import Standing
from paretune.tracking.mlflow.texts import (
    candidate_params,
    candidate_tags,
    metrics,
    note,
    run_names,
    rung0_table,
    study_metrics,
    study_params,
)
from paretune.tracking.report.report import report_html
from paretune.tracking.report.targets import targets_table
from paretune.tracking.wording import named

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STATUS = {
    "complete": "FINISHED",
    "interrupted": "KILLED",
    "paused": "KILLED",
    "cancelled": "KILLED",
    "failed": "FAILED",
}
MAX_PARAM, MAX_TAG, MAX_PARAMS = 6000, 5000, 100
TARGETS = "targets.json"


@dataclass
class StudyRuns:
    """The MLflow runs of one study: a parent, and a child per confirmed candidate."""

    client: MlflowClient
    location: str | None
    store: Store
    view: StudyView

    def __post_init__(self) -> None:
        self.times = {e.key: (_milliseconds(e.at), e.seconds) for e in self.store.evaluations("confirmed", "complete")}
        self.standing = Standing.of(self.view)
        self.names = run_names(self.view)
        self.experiment = experiment_of(self.client, self.location)
        self.parent, self.children = self._find()
        if self.parent is None:
            tags = self._identity() | {"kind": "study", "mlflow.source.name": "paretune"}
            self.parent = self.client.create_run(
                self.experiment, _milliseconds(self.view.meta.get("created")), tags, self.view.study
            )

    def publish(self, point: Point) -> None:
        """Create or complete the run of a confirmed candidate."""
        at, seconds = self.times.get(point.key, (_milliseconds(None), 0.0))
        run = self.children.get(point.key)
        if run is None:
            tags = self._identity() | {
                "kind": "candidate",
                "paretune.candidate": point.key,
                "mlflow.parentRunId": self.parent.info.run_id,
                "mlflow.source.name": "paretune",
            }
            name = self.names.get(point.key, point.name)
            run = self.client.create_run(self.experiment, at - int(1000 * seconds), tags, name)
        self._log(run, candidate_params(point), candidate_tags(point), metrics(point), at)
        self.client.set_terminated(run.info.run_id, "FINISHED", at)
        self.children[point.key] = self.client.get_run(run.info.run_id)

    def refreshing(self, force: bool) -> Iterator[Callable[[], None]]:
        """Steps that bring everything that depends on the whole study up to date; its files only if the study changed."""
        for point in self.view.confirmed:
            run = self.children.get(point.key)
            if run is not None:
                yield partial(self._stand, run, point)
        for side, choice in zip(self.standing.sides, self.standing.choices, strict=True):
            if choice is not None:
                yield partial(self._register, choice.chosen, side.name)
        digest = _digest(self.view, self.standing)
        if force or self.parent.data.tags.get("paretune.digest") != digest:
            yield partial(self._write_parent, digest)

    def _identity(self) -> dict[str, str]:
        """What every run of the study carries. The time of creation tells two studies of one name apart."""
        meta = self.view.meta
        return {
            "paretune.study": self.view.study,
            "paretune.created": str(meta.get("created")),
            "study": self.view.study,
            "hardware": named(meta.get("profile")),
            "teacher": named(meta.get("teacher")),
        }

    def _find(self) -> tuple[Any, dict[str, Run]]:
        """The parent (None if new) and the children by candidate key."""
        mine = self._identity()
        condition = " and ".join(
            f"tags.`{name}` = {quoted(mine[name])}" for name in ("paretune.study", "paretune.created")
        )
        parent, token = None, None
        children: dict[str, Run] = {}
        while True:
            page = self.client.search_runs([self.experiment], condition, max_results=1000, page_token=token)
            for run in page:
                key = run.data.tags.get("paretune.candidate")
                if key is not None:
                    children.setdefault(key, run)
                elif parent is None:
                    parent = run
            token = page.token
            if not token:
                return parent, children

    def _log(
        self,
        run: Run,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        metrics: Mapping[str, float] | None = None,
        at: int = 0,
    ) -> None:
        """Add what the run does not have yet. Parameters are immutable: one that differs keeps its first value."""
        from mlflow.entities import Metric, Param, RunTag

        params = {k: v for k, v in params.items() if k not in run.data.params}
        tags = {k: v for k, v in tags.items() if run.data.tags.get(k) != v}
        # A fixed time and step make a repeated metric the same row, not another point of a curve.
        values = [Metric(k, v, at, 0) for k, v in (metrics or {}).items()]
        if params or tags or values:
            self.client.log_batch(
                run.info.run_id,
                values,
                [Param(k, v[:MAX_PARAM]) for k, v in list(params.items())[:MAX_PARAMS]],
                [RunTag(k, v[:MAX_TAG]) for k, v in tags.items()],
            )

    def _stand(self, run: Run, point: Point) -> None:
        """Tags that change as the fronts move, costs on further targets, and the artifact of who is on a front."""
        tie = self.view.ties.get(point.key, "")
        tags = self.standing.tags(point.key)
        if tie or "tied_with" in run.data.tags:
            tags["tied_with"] = self.names.get(tie, tie)
        folder = self.store.artifact(point.key)
        wanted = bool(self.standing.fronts(point.key)) and "paretune.artifact" not in run.data.tags
        if wanted and folder is not None and folder.is_dir():
            self.client.log_artifacts(run.info.run_id, str(folder), ARTIFACT)
            tags["paretune.artifact"] = folder.name
        self._log(run, {}, tags, _changed(run, self.standing.metrics(point.key)), _milliseconds(None))
        self.children[point.key] = run

    def _register(self, chosen: Point, profile: str) -> None:
        """A version of the teacher's registered model for a target's recommended candidate, with the target's alias."""
        run, folder = self.children.get(chosen.key), self.store.artifact(chosen.key)
        if run is not None and folder is not None and folder.is_dir():
            Registry(self.client, self.view).register(run, self.view.point(chosen.key) or chosen, profile)

    def _write_parent(self, digest: str) -> None:
        """Files, note, figures and status of the study. The digest goes last, so that a crash repeats this."""
        run_id = self.parent.info.run_id
        with tempfile.TemporaryDirectory(prefix="paretune-") as folder:
            _write_files(self.view, Path(folder))
            self.client.log_artifacts(run_id, folder)
        state = str(self.view.meta.get("state") or "running")
        if state in STATUS:
            self.client.set_terminated(run_id, STATUS[state])
        else:
            self.client.update_run(run_id, status="RUNNING")
        tags = {
            "kind": "study",
            "mlflow.note.content": note(self.view, self.standing, run_id),
            "state": state,
            "mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"} for name in _tables(self.view)]),
        }
        if self.view.targets:
            tags["targets"] = ", ".join(t.name for t in self.view.targets)
        figures = _changed(self.parent, study_metrics(self.view, self.standing.chosen))
        self._log(self.parent, study_params(self.view), tags, figures, _milliseconds(None))
        self.client.set_tag(run_id, "paretune.digest", digest)


def _write_files(view: StudyView, folder: Path) -> None:
    (folder / "report.html").write_text(report_html(view), encoding="utf-8")
    (folder / "front.html").write_text(figure_html(view), encoding="utf-8")
    (folder / "rung0.json").write_text(json.dumps(rung0_table(view)), encoding="utf-8")
    front_png(view, folder / "front.png")
    prices, picture = targets_table(view), targets_html(view)
    if prices is not None and picture is not None:
        (folder / TARGETS).write_text(json.dumps(prices), encoding="utf-8")
        (folder / "targets.html").write_text(picture, encoding="utf-8")


def _tables(view: StudyView) -> list[str]:
    """What MLflow shows as tables."""
    return ["rung0.json", *([TARGETS] if view.targets else [])]


def _digest(view: StudyView, standing: Standing) -> str:
    """Changes whenever the parent run would look different."""
    parts = [
        view.meta.get("state"),
        view.meta.get("stage"),
        len(view.rung0),
        len(view.failures),
        [p.key for p in view.confirmed],
        [p.key for p in view.front],
        sorted(view.ties),
        [None if choice is None else choice.chosen.key for choice in standing.choices],
        [t.to_dict() for t in view.targets],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _milliseconds(at: Any) -> int:
    """Unix milliseconds of an ISO time, now if there is none."""
    return int(1000 * (time.time() if not at else datetime.datetime.fromisoformat(str(at)).timestamp()))


def _changed(run: Run, figures: Mapping[str, float]) -> dict[str, float]:
    """Figures that the run does not show yet: one that moves is logged with the time of now, so that MLflow takes it for the latest."""
    return {name: value for name, value in figures.items() if run.data.metrics.get(name) != value}
