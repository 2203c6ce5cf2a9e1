"""The machine lock: work holds it shared, a measurement holds it exclusively.

It is a kernel lock (flock) on one file per user, so it spans all studies on the machine and a crash releases it.
Writers of flock starve under a stream of readers, so an exclusive holder first takes a gate that readers pass through.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paretune.common.errors import EnvironmentProblem


class MachineLock:
    """Shared for training, evaluation and housekeeping; exclusive for timing. Not reentrant."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.gettempdir()) / f"paretune-{os.getuid()}"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold while computing; give it up between steps so that a measurement can come in."""
        with self._flock("gate", fcntl.LOCK_SH, None):
            pass
        with self._flock("machine", fcntl.LOCK_SH, None):
            yield

    @contextmanager
    def exclusive(self, timeout_s: float = 120.0) -> Iterator[None]:
        """Hold while timing. Raises EnvironmentProblem if others keep the machine for `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._flock("gate", fcntl.LOCK_EX, deadline), self._flock("machine", fcntl.LOCK_EX, deadline):
            yield

    @contextmanager
    def _flock(self, name: str, mode: int, deadline: float | None) -> Iterator[None]:
        handle = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if deadline is None:
                fcntl.flock(handle, mode)
            else:
                _poll(handle, mode, deadline)
            yield
        finally:
            os.close(handle)


def _poll(handle: int, mode: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise EnvironmentProblem(
                    "the machine was busy with other paretune work for too long to measure",
                    "run one search at a time on this machine",
                ) from None
            time.sleep(0.01)
