"""Addresses on MLflow's own web page over our database, and the end of its process."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
from pathlib import Path

from paretune.common.command_line import pasted
from paretune.common.errors import UsageError
from paretune.tracking.mlflow.experiment import EXPERIMENT, VIEWS, runs_page
from paretune.tracking.mlflow.paths import database_path

GRACE_S = 10.0


def start_page(home: Path, server: str) -> str:
    """Address of the fronts of all studies in the chart view of a `server` that shows `home`: MLflow's own start page does not lead
    to runs at once. The server's own address if `home` has no study in its database."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_reader(home)) as database:
        found = database.execute("SELECT experiment_id FROM experiments WHERE name = ?", (EXPERIMENT,)).fetchone()
        return server if found is None else f"{server}#{runs_page(str(found[0]), VIEWS[0].key)}"
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
        return None if found is None else f"{server.partition('#')[0]}#/experiments/{found[0]}/runs/{found[1]}"
    return None


def _reader(home: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{database_path(home).as_uri()}?mode=ro", uri=True, timeout=5.0)


def require_database(home: Path) -> None:
    """Raises UsageError if `home` holds no MLflow database."""
    if not database_path(home).is_file():
        raise UsageError(
            f"there is no MLflow database in {home}",
            f"run a search first, or `{pasted('sync', home=home)}` to rebuild it from the studies",
        )


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
