"""MLflow's own web page over our database: one worker, no job executor, loopback only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from paretune.hardware_profiles.command_line import pasted
from paretune.hardware_profiles.errors import EnvironmentProblem, UsageError
from paretune.tracking.mlflow_experiment import EXPERIMENT, VIEWS, runs_page

GRACE_S = 10.0
QUIET = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}


def serve_ui(home: Path, port: int) -> int:
    """Serve MLflow on http://127.0.0.1:`port` until Ctrl-C or SIGTERM; returns the exit status, 0 if so ended.

    To be called in the main thread. Raises UsageError if nothing was recorded in `home` yet, EnvironmentProblem if the
    port is taken.
    """
    command = server_command(home, port)
    _require_free(port)
    print(f"MLflow shows {home} at {start_page(home, port)} (end with Ctrl-C)", file=sys.stderr, flush=True)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    # A session of its own: uvicorn starts workers, and they all must end with it.
    server = subprocess.Popen(command, env=os.environ | QUIET, start_new_session=True)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        end_server(server)


def start_page(home: Path, port: int) -> str:
    """Address of the fronts of all studies in the chart view: MLflow's own start page does not lead to runs at once. The
    server's own address if `home` has no study in its database."""
    server = f"http://127.0.0.1:{port}"
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_reader(home)) as database:
        found = database.execute("SELECT experiment_id FROM experiments WHERE name = ?", (EXPERIMENT,)).fetchone()
        return server if found is None else f"{server}/#{runs_page(str(found[0]), VIEWS[0].key)}"
    return server


def run_page(home: Path, server: str, study: str, key: str) -> str | None:
    """Address of a candidate's run on a `server` that shows `home`; None if it is not recorded there."""
    query = (
        "SELECT runs.experiment_id, runs.run_uuid FROM runs JOIN tags a ON a.run_uuid = runs.run_uuid AND a.key = 'paretune.study' "
        "AND a.value = ? JOIN tags b ON b.run_uuid = runs.run_uuid AND b.key = 'paretune.candidate' AND b.value = ? "
        "WHERE runs.lifecycle_stage = 'active'"
    )
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_reader(home)) as database:
        found = database.execute(query, (study, key)).fetchone()
        return None if found is None else f"{server.partition('/#')[0]}/#/experiments/{found[0]}/runs/{found[1]}"
    return None


def _reader(home: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{(home.resolve() / 'mlflow.db').as_uri()}?mode=ro", uri=True, timeout=5.0)


def server_command(home: Path, port: int) -> list[str]:
    """The command line of the server. Raises UsageError if `home` holds no MLflow database."""
    database = home.resolve() / "mlflow.db"
    if not database.is_file():
        raise UsageError(
            f"there is no MLflow database in {home}",
            f"run a search first, or `{pasted('sync', home=home)}` to rebuild it from the studies",
        )
    return [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{database}",
        "--artifacts-destination",
        str(home.resolve() / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise EnvironmentProblem(f"port {port} cannot be opened: {error}", "choose another with --port") from None


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def end_server(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
            server.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
