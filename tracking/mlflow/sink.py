"""MLflow as a view of the store: one writer, driven by the outbox, idempotent by our ids.

A run is found by its tags before it is created, an outbox row is done only after its run is complete, so a crash
anywhere repeats nothing and loses nothing. Only explicit run ids: MLflow's fluent active run is not safe in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.common.command_line import pasted
from paretune.common.errors import EnvironmentProblem, ParetuneError
from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view
from paretune.tracking.mlflow.experiment import experiment_of
from paretune.tracking.mlflow.paths import artifact_root, database_uri, follow_home
from paretune.tracking.mlflow.runs import StudyRuns

if TYPE_CHECKING:
    from mlflow import MlflowClient

DRAIN_S = 60.0
LOCK_S = 20.0
ANSWER_S = 5.0
Workload = Callable[[], AbstractContextManager[None]]
# Set before the first import of MLflow: no telemetry, no pickle, no words on stdout, which is for data. And a server that is
# away is noticed in seconds, unless the user says otherwise.
FIXED = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def tracking_uri(home: Path) -> str:
    """MLFLOW_TRACKING_URI if the user set it, else the SQLite file in `home`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or database_uri(home)


def try_drain(home: Path, store: Store, view: StudyView, turn: Workload = contextlib.nullcontext) -> str | None:
    """Publish what the outbox holds; returns a problem in one line instead of raising: MLflow may cost no trial."""
    try:
        MlflowSink(home).drain(store, view, turn=turn)
    except Exception as error:  # A view that fails is reported, never fatal; the store keeps all for the next try.
        return one_line(error)
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
            f"MLflow could not be written: {one_line(error)}", "mend it and repeat; the study itself is safe"
        ) from error
    finally:
        store.close()


class MlflowSink:
    """Writes studies of `home` into MLflow. Cheap to construct; the first drain opens or creates the database."""

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.uri = tracking_uri(home)

    def drain(
        self, store: Store, view: StudyView, within_s: float = DRAIN_S, turn: Workload = contextlib.nullcontext
    ) -> int:
        """Publish outbox rows for about `within_s` seconds, then bring tags, charts and registry up to date. `turn` is held
        during every step, and let go between them.

        Returns how many candidates were published; what time did not allow stays in the outbox, and so does what
        is newer than `view`. Raises EnvironmentProblem, or what MLflow raises.
        """
        with self._alone():
            self._require_there()
            self._follow_home()
            with turn():
                runs = StudyRuns(_client(self.uri), self._artifact_location(), store, view)
            published = self._publish(store, runs, view, time.monotonic() + within_s, turn)
            for step in runs.refreshing(force=published > 0):
                with turn():
                    step()
        return published

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[MlflowClient, str]]:
        """A client and the id of our experiment, while no other process writes. Raises EnvironmentProblem, or what MLflow raises."""
        with self._alone():
            self._require_there()
            self._follow_home()
            client = _client(self.uri)
            yield client, experiment_of(client, self._artifact_location())

    def _require_there(self) -> None:
        """Raises EnvironmentProblem if the database cannot be written or the server is silent. Asked before the first turn is
        taken, so that no measurement waits for MLflow."""
        if self.uri.startswith("sqlite"):
            _require_writable(self.home / "mlflow.db")
        elif self.uri.startswith(("http://", "https://")):
            _require_answer(self.uri)

    def _follow_home(self) -> None:
        if self.uri == database_uri(self.home):
            follow_home(self.home)

    def _publish(self, store: Store, runs: StudyRuns, view: StudyView, deadline: float, turn: Workload) -> int:
        points = {p.key: p for p in view.confirmed}
        published = 0
        for identity, kind, key in store.outbox():
            if kind == "confirmed" and key in points:
                if published and time.monotonic() > deadline:
                    break
                with turn():
                    runs.publish(points[key])
                published += 1
            elif kind == "confirmed":
                continue  # Newer than the view: the next drain has it.
            store.outbox_done(identity)
        return published

    def _artifact_location(self) -> str | None:
        """Absolute, because MLflow's default depends on the working directory; a remote server decides itself."""
        return artifact_root(self.home) if self.uri.startswith("sqlite") else None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer per home: two processes on a fresh database would both migrate it."""
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "mlflow.lock").open("a", encoding="utf-8") as lock:
            _poll_lock(lock.fileno(), time.monotonic() + LOCK_S)
            yield


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
            f"free or move it away; `{pasted('sync', home=database.parent)}` rebuilds it from the studies",
        ) from None


def _require_answer(uri: str) -> None:
    """Any answer will do, also a refusal: whether it may be used is for MLflow's client to find out, with its own credentials."""
    parts = urllib.parse.urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    try:
        urllib.request.urlopen(f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return
        raise EnvironmentProblem(
            f"the MLflow server at {host} does not answer: {getattr(error, 'reason', error)}",
            f"`{pasted('sync')}` writes what is missing when it is back",
        ) from None


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, cut after 300 characters; errors not of ours name their class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text[:300] if isinstance(error, ParetuneError) else f"{type(error).__name__}: {text[:300]}"
