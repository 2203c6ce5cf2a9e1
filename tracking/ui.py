"""MLflow's own web page over our database: one worker, no job executor, loopback only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from paretune.hardware_profiles.errors import EnvironmentProblem, UsageError

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
    print(f"MLflow shows {home} at http://127.0.0.1:{port} (end with Ctrl-C)", file=sys.stderr, flush=True)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    # A session of its own: uvicorn starts workers, and they all must end with it.
    server = subprocess.Popen(command, env=os.environ | QUIET, start_new_session=True)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(server)


def server_command(home: Path, port: int) -> list[str]:
    """The command line of the server. Raises UsageError if `home` holds no MLflow database."""
    database = home.resolve() / "mlflow.db"
    if not database.is_file():
        raise UsageError(
            f"there is no MLflow database in {home}",
            "run a search first, or `paretune sync` to rebuild it from the studies",
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


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, kind)
            server.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
