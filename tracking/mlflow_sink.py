"""MLflow as a view of the store: one writer, driven by the outbox, idempotent by our ids.

A run is found by its tags before it is created, an outbox row is done only after its run is complete, so a crash
anywhere repeats nothing and loses nothing. Only explicit run ids: MLflow's fluent active run is not safe in a thread.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.hardware_profiles.errors import EnvironmentProblem, ParetuneError
from paretune.search.recommend import Recommendation
from paretune.search.store import Store
from paretune.search.view import Point, StudyView, load_view
from paretune.spaces.candidate import PER_CHANNEL
from paretune.tracking.charts import figure_html, front_png, headline, measurement, named, recommended, with_interval
from paretune.tracking.report import flat, report_html

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "paretune"
METRICS = (
    "nll",
    "relative_loss",
    "decode_ms_per_token",
    "ttft_ms",
    "peak_memory_bytes",
    "compressed_bytes",
    "kl",
    "top1_agreement",
)
RUNG0_COLUMNS = ("estimated_nll", "decode_ms_per_token", "ttft_ms", "bytes", "compressed_bytes")
STATUS = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
DRAIN_S = 60.0
LOCK_S = 20.0
MAX_PARAM, MAX_TAG, MAX_PARAMS = 6000, 5000, 100
ARTIFACT = "artifact"
# Set before the first import of MLflow: no telemetry, no pickle; a server that is away is noticed in seconds, unless the
# user says otherwise.
FIXED = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI if the user set it, else the SQLite file in `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


def try_drain(home: Path, store: Store, view: StudyView) -> str | None:
    """Publish what the outbox holds; returns a problem in one line instead of raising: MLflow may cost no trial."""
    try:
        MlflowSink(home).drain(store, view)
    except Exception as error:  # A view that fails is reported, never fatal; the store keeps all for the next try.
        return _one_line(error)
    return None


def rebuild(home: Path, folder: Path) -> int:
    """Publish a whole study again, for `paretune sync`; returns how many candidates.

    Raises UsageError without a study, EnvironmentProblem while a search runs on it or if MLflow cannot be written.
    """
    store = Store.open_study(folder)
    try:
        store.refill_outbox()
        return MlflowSink(home).drain(store, load_view(store), within_s=float("inf"))
    except ParetuneError:
        raise
    except Exception as error:
        raise EnvironmentProblem(
            f"MLflow could not be written: {_one_line(error)}", "mend it and repeat; the study itself is safe"
        ) from error
    finally:
        store.close()


class MlflowSink:
    """Writes studies of `home` into MLflow. Cheap to construct; the first drain opens or creates the database."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.uri = tracking_uri(home)

    def drain(self, store: Store, view: StudyView, within_s: float = DRAIN_S) -> int:
        """Publish outbox rows for about `within_s` seconds, then bring tags, charts and registry up to date.

        Returns how many candidates were published; what time did not allow stays in the outbox, and so does what
        is newer than `view`. Raises EnvironmentProblem, or what MLflow raises.
        """
        with self._alone():
            if self.uri.startswith("sqlite:"):
                _require_writable(self.home / "mlflow.db")
            runs = _StudyRuns(_client(self.uri), self._artifact_location(), store, view)
            published = self._publish(store, runs, view, time.monotonic() + within_s)
            runs.refresh(force=published > 0)
        return published

    def _publish(self, store: Store, runs: _StudyRuns, view: StudyView, deadline: float) -> int:
        points = {p.key: p for p in view.confirmed}
        published = 0
        for identity, kind, key in store.outbox():
            if kind == "confirmed" and key in points:
                if published and time.monotonic() > deadline:
                    break
                runs.publish(points[key])
                published += 1
            elif kind == "confirmed":
                continue  # Newer than the view: the next drain has it.
            store.outbox_done(identity)
        return published

    def _artifact_location(self) -> str | None:
        """Absolute, because MLflow's default depends on the working directory; a remote server decides itself."""
        return (self.home / "artifacts").as_uri() if self.uri.startswith("sqlite:") else None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer per home: two processes on a fresh database would both migrate it."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "mlflow.lock").open("a") as lock:
            _poll_lock(lock.fileno(), time.monotonic() + LOCK_S)
            yield


@dataclass
class _StudyRuns:
    """The MLflow runs of one study: a parent, and a child per confirmed candidate."""

    client: MlflowClient
    location: str | None
    store: Store
    view: StudyView

    def __post_init__(self) -> None:
        self.times = {e.key: (_milliseconds(e.at), e.seconds) for e in self.store.evaluations("confirmed", "complete")}
        self.experiment = self._experiment()
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
        self._log(run, _candidate_params(point), _candidate_tags(point), _metrics(point), at)
        self.client.set_terminated(run.info.run_id, "FINISHED", at)
        self.children[point.key] = self.client.get_run(run.info.run_id)

    def refresh(self, force: bool) -> None:
        """Bring everything that depends on the whole study up to date; its files only if the study changed."""
        chosen = recommended(self.view)
        front = {p.key for p in self.view.front}
        for point in self.view.confirmed:
            run = self.children.get(point.key)
            if run is not None:
                self._standing(run, point, point.key in front, chosen)
        if chosen is not None:
            self._register(chosen)
        digest = _digest(self.view, chosen)
        if force or self.parent.data.tags.get("paretune.digest") != digest:
            self._write_parent(chosen, digest)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            return str(self.client.create_experiment(EXPERIMENT, artifact_location=self.location))
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

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
            "mlflow.loggedArtifacts": json.dumps([{"path": "rung0.json", "type": "table"}]),
        }
        self._log(self.parent, _study_params(self.view), tags)
        self.client.set_tag(run_id, "paretune.digest", digest)


def model_name(view: StudyView) -> str:
    """Name of the registered model of a study's teacher."""
    return "student-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", named(view.meta.get("teacher"))).strip(".-")


def alias_of(profile: str) -> str:
    """A profile's alias: its name, but for the names that MLflow reserves."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", profile)
    return f"hw-{name}" if re.fullmatch(r"latest|v\d+", name, re.IGNORECASE) else name


def note(view: StudyView, chosen: Recommendation | None) -> str:
    """The parent run's description in Markdown; all values are measured unless they say otherwise."""
    why = ["No candidate is confirmed yet."]
    if chosen is not None:
        why = [
            f"**Recommended: {chosen.chosen.name}** (`{chosen.chosen.key[:8]}`)",
            "",
            *(f"- {reason}" for reason in chosen.why),
        ]
    columns = ("nll", "decode_ms_per_token", "compressed_bytes")
    rows = [f"| {p.name} | {' | '.join(_cell(p, name) for name in columns)} |" for p in view.front[:25]]
    state = f"State: {view.meta.get('state') or 'running'}. Open `report.html` or `front.html` under Artifacts."
    table = ["| front member | NLL | decode per token | compressed |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([f"### {headline(view)}", "", state, "", *why, "", *table])


def rung0_table(view: StudyView) -> dict[str, Any]:
    """All rung-0 rows as MLflow's table format; values are estimates, bytes are counted."""

    def cells(point: Point) -> list[float | None]:
        return [m.value if (m := point.measurements.get(name)) else None for name in RUNG0_COLUMNS]

    rows = [[p.key, p.number, p.source, p.description, *cells(p)] for p in view.rung0]
    return {"columns": ["key", "number", "source", "description", *RUNG0_COLUMNS], "data": rows}


def _cell(point: Point, name: str) -> str:
    m = measurement(point, name)
    return with_interval(name, m) + ("" if m is None or m.provenance == "measured" else f" ({m.provenance})")


def _write_files(view: StudyView, folder: Path) -> None:
    (folder / "report.html").write_text(report_html(view))
    (folder / "front.html").write_text(figure_html(view))
    (folder / "rung0.json").write_text(json.dumps(rung0_table(view)))
    front_png(view, folder / "front.png")


def _candidate_params(point: Point) -> dict[str, str]:
    """What varies between candidates; mixed layers are listed with slashes."""
    x = point.candidate
    executed = [x.head_format, *(f for layer in x.layers for f in (layer.attention_format, layer.ffn_format))]
    sizes = {f.group_size for f in (x.embedding_format, *executed) if f.is_integer}

    def joined(values: Any) -> str:
        return "/".join(str(v) for v in dict.fromkeys(values)) or "none"

    return {
        "layers": str(len(x.layers)),
        "ffn": joined(layer.ffn for layer in x.layers),
        "kv_groups": joined(layer.kv_groups for layer in x.layers),
        "pattern": joined(layer.pattern.kind for layer in x.layers),
        "sparsity": joined(layer.pattern.ratio for layer in x.layers),
        "attention": joined(layer.attention_format.name for layer in x.layers),
        "ffn_precision": joined(layer.ffn_format.name for layer in x.layers),
        "quantizer": x.quantizer,
        "head": x.head_format.name,
        "embedding": x.embedding_format.name,
        "group_size": joined("channel" if size == PER_CHANNEL else size for size in sorted(sizes)),
        "activations": joined(sorted({f.activation for f in executed})),
    }


def _candidate_tags(point: Point) -> dict[str, str]:
    latency = measurement(point, "decode_ms_per_token")
    return {
        "source": point.source,
        "latency": "none" if latency is None else latency.provenance,
        "mlflow.note.content": point.description,
    }


def _metrics(point: Point) -> dict[str, float]:
    return {name: m.value for name in METRICS if (m := measurement(point, name)) is not None}


def _study_params(view: StudyView) -> dict[str, str]:
    """What is constant in a study: teacher, profile, seed, objectives, settings, versions."""
    meta = view.meta
    found = {
        "teacher": named(meta.get("teacher")),
        "profile": named(meta.get("profile")),
        "seed": str(meta.get("seed")),
        "objectives": ", ".join(view.objectives),
    }
    for prefix, value in (("spec", meta.get("spec")), ("version", meta.get("versions"))):
        found |= {re.sub(r"[^\w./ -]", "_", f"{prefix}.{name}")[:250]: text for name, text in flat(value)}
    return found


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
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _client(uri: str) -> MlflowClient:
    os.environ.update(FIXED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _poll_lock(handle: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise EnvironmentProblem("another process keeps writing to MLflow", "it is tried again later") from None
            time.sleep(0.1)


def _require_writable(database: Path) -> None:
    """MLflow tries a broken database ten times over 100 s; we look once. A file that is not there yet is fine."""
    if not database.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=5.0, isolation_level=None)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        raise EnvironmentProblem(
            f"the MLflow database {database} cannot be written: {error}",
            "free or move it away; `paretune sync` rebuilds it from the studies",
        ) from None


def _milliseconds(at: Any) -> int:
    """Unix milliseconds of an ISO time, now if there is none."""
    return int(1000 * (time.time() if not at else datetime.datetime.fromisoformat(str(at)).timestamp()))


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _quoted(text: str) -> str:
    """A string of MLflow's filter language, which has no escapes."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text[:300] if isinstance(error, ParetuneError) else f"{type(error).__name__}: {text[:300]}"
