"""The MLflow runs of one study: a parent, a child per confirmed candidate, and the registered model of its teacher."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.search.recommend import Recommendation
from paretune.search.store import Store
from paretune.search.view import Point, StudyView
from paretune.tracking.charts import figure_html
from paretune.tracking.mlflow_texts import candidate_params, candidate_tags, metrics, note, rung0_table, study_params
from paretune.tracking.picture import front_png
from paretune.tracking.report import report_html
from paretune.tracking.report_targets import targets_table
from paretune.tracking.targets_picture import targets_html
from paretune.tracking.wording import named, recommended

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "paretune"
STATUS = {
    "complete": "FINISHED",
    "interrupted": "KILLED",
    "paused": "KILLED",
    "cancelled": "KILLED",
    "failed": "FAILED",
}
MAX_PARAM, MAX_TAG, MAX_PARAMS = 6000, 5000, 100
ARTIFACT = "artifact"
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
        self.experiment = experiment_of(self.client, self.location)
        self.parent, self.children = self._find()
        if self.parent is None:
            tags = self._identity() | {"paretune.kind": "study", "mlflow.source.name": "paretune"}
            self.parent = self.client.create_run(
                self.experiment, _milliseconds(self.view.meta.get("created")), tags, self.view.study
            )

    def publish(self, point: Point) -> None:
        """Create or complete the run of a confirmed candidate."""
        at, seconds = self.times.get(point.key, (_milliseconds(None), 0.0))
        run = self.children.get(point.key)
        if run is None:
            tags = self._identity() | {
                "paretune.kind": "candidate",
                "paretune.candidate": point.key,
                "mlflow.parentRunId": self.parent.info.run_id,
                "mlflow.source.name": "paretune",
            }
            run = self.client.create_run(self.experiment, at - int(1000 * seconds), tags, point.name)
        self._log(run, candidate_params(point), candidate_tags(point), metrics(point), at)
        self.client.set_terminated(run.info.run_id, "FINISHED", at)
        self.children[point.key] = self.client.get_run(run.info.run_id)

    def refreshing(self, force: bool) -> Iterator[Callable[[], None]]:
        """Steps that bring everything that depends on the whole study up to date; its files only if the study changed."""
        chosen = recommended(self.view)
        front = {p.key for p in self.view.front}
        for point in self.view.confirmed:
            run = self.children.get(point.key)
            if run is not None:
                yield partial(self._standing, run, point, point.key in front, chosen)
        if chosen is not None:
            yield partial(self._register, chosen)
        digest = _digest(self.view, chosen)
        if force or self.parent.data.tags.get("paretune.digest") != digest:
            yield partial(self._write_parent, chosen, digest)

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
            f"tags.`{name}` = {_quoted(mine[name])}" for name in ("paretune.study", "paretune.created")
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

    def _standing(self, run: Run, point: Point, on_front: bool, chosen: Recommendation | None) -> None:
        """Tags that change as the front moves, and the artifact of a front member."""
        star = chosen is not None and chosen.chosen.key == point.key
        tags = {"pareto": _flag(on_front), "recommended": _flag(star), "tied_with": self.view.ties.get(point.key, "")}
        folder = self.store.artifact(point.key)
        if on_front and folder is not None and folder.is_dir() and "paretune.artifact" not in run.data.tags:
            self.client.log_artifacts(run.info.run_id, str(folder), ARTIFACT)
            tags["paretune.artifact"] = folder.name
        self._log(run, {}, tags)
        self.children[point.key] = run

    def _register(self, chosen: Recommendation) -> None:
        """A version of the teacher's registered model for the recommended candidate, with the profile's alias."""
        run = self.children.get(chosen.chosen.key)
        if run is None or (folder := self.store.artifact(chosen.chosen.key)) is None or not folder.is_dir():
            return
        name = model_name(self.view)
        aliases = self._registered_model(name)
        versions = {str(v.version): v for v in self.client.search_model_versions(f"name = {_quoted(name)}")}
        version = next((v for v in versions.values() if v.run_id == run.info.run_id), None)
        if version is None:
            version = self.client.create_model_version(
                name,
                f"{run.info.artifact_uri}/{ARTIFACT}",
                run.info.run_id,
                await_creation_for=None,
                tags=self._identity() | {"paretune.candidate": chosen.chosen.key},
                description=chosen.chosen.description,
            )
        alias = alias_of(named(self.view.meta.get("profile")))
        current = versions.get(str(aliases.get(alias)))
        if str(aliases.get(alias)) != str(version.version) and not self._is_newer(current):
            self.client.set_registered_model_alias(name, alias, version.version)

    def _registered_model(self, name: str) -> dict[str, Any]:
        """Create the registered model if need be; returns its aliases with their versions."""
        from mlflow.exceptions import MlflowException

        try:
            return dict(self.client.get_registered_model(name).aliases)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        teacher = named(self.view.meta.get("teacher"))
        text = f"Students of {teacher}; an alias per hardware profile names the recommended one."
        self.client.create_registered_model(name, description=text)
        return {}

    def _is_newer(self, version: Any) -> bool:
        """Whether an alias already points into a younger study: rebuilding an old one must not turn it back."""
        return version is not None and str(version.tags.get("paretune.created", "")) > str(
            self.view.meta.get("created")
        )

    def _write_parent(self, chosen: Recommendation | None, digest: str) -> None:
        """Files, note and status of the study. The digest goes last, so that a crash repeats this."""
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
            "mlflow.note.content": note(self.view, chosen),
            "state": state,
            "targets": ", ".join(t.name for t in self.view.targets),
            "mlflow.loggedArtifacts": json.dumps([{"path": name, "type": "table"} for name in _tables(self.view)]),
        }
        self._log(self.parent, study_params(self.view), tags)
        self.client.set_tag(run_id, "paretune.digest", digest)


def experiment_of(client: MlflowClient, location: str | None) -> str:
    """Id of our experiment, made or restored if need be; `location` is where a new one keeps its files."""
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        return str(client.create_experiment(EXPERIMENT, artifact_location=location))
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def model_name(view: StudyView) -> str:
    """Name of the registered model of a study's teacher."""
    return "student-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", named(view.meta.get("teacher"))).strip(".-")


def alias_of(profile: str) -> str:
    """A profile's alias: its name, but for the names that MLflow reserves."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", profile)
    return f"hw-{name}" if re.fullmatch(r"latest|v\d+", name, re.IGNORECASE) else name


def _write_files(view: StudyView, folder: Path) -> None:
    (folder / "report.html").write_text(report_html(view))
    (folder / "front.html").write_text(figure_html(view))
    (folder / "rung0.json").write_text(json.dumps(rung0_table(view)))
    front_png(view, folder / "front.png")
    prices, picture = targets_table(view), targets_html(view)
    if prices is not None and picture is not None:
        (folder / TARGETS).write_text(json.dumps(prices))
        (folder / "targets.html").write_text(picture)


def _tables(view: StudyView) -> list[str]:
    """What MLflow shows as tables."""
    return ["rung0.json", *([TARGETS] if view.targets else [])]


def _digest(view: StudyView, chosen: Recommendation | None) -> str:
    """Changes whenever the parent run would look different."""
    parts = [
        view.meta.get("state"),
        view.meta.get("stage"),
        len(view.rung0),
        len(view.failures),
        [p.key for p in view.confirmed],
        [p.key for p in view.front],
        sorted(view.ties),
        None if chosen is None else chosen.chosen.key,
        [t.to_dict() for t in view.targets],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _milliseconds(at: Any) -> int:
    """Unix milliseconds of an ISO time, now if there is none."""
    return int(1000 * (time.time() if not at else datetime.datetime.fromisoformat(str(at)).timestamp()))


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"
