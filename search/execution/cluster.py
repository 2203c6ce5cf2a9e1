"""Asking a Ray cluster whether it is there, before anything depends on it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time

from paretune.common.errors import EnvironmentProblem, UsageError

PATIENCE_S = 20.0


def require_cluster(address: str, within_s: float = PATIENCE_S) -> None:
    """Raises UsageError if `address` is none, EnvironmentProblem if no Ray cluster answers there within `within_s` seconds.

    Ray itself would try for a minute and more.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--address must be HOST:PORT, ray://HOST:PORT or auto, but got {address!r}", "correct it")
    deadline = time.monotonic() + within_s
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=within_s).close()
    except OSError as error:
        raise _nobody(address, error.strerror or str(error) or type(error).__name__) from None
    if not address.startswith("ray://"):
        _ask_status(address, max(1.0, deadline - time.monotonic()))


def _ask_status(address: str, within_s: float) -> None:
    """Something listens there: is it Ray?"""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    with contextlib.suppress(subprocess.TimeoutExpired):
        if subprocess.run(command, capture_output=True, timeout=within_s).returncode == 0:
            return
    raise _nobody(address, "what listens there does not answer as Ray")


def _nobody(address: str, reason: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"no Ray cluster answers at {address}: {reason}",
        "start one there with `ray start --head`, or leave --address out to run on this machine alone",
    )
