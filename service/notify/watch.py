"""The process beside a search that tells of its end: `python -m paretune.service.notify.watch`, its standard input held by the search.

The first line has whom to tell and what is known; the second, written at the end, how it ended. Where that line never comes
before the input closes, the search was killed, and that is what is told. It has a session of its own, so it outlives what
kills the search's processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paretune.common.files import write_atomically
from paretune.search.study.records import now
from paretune.service.notify.notify import Notify, tell

LONGEST_S = 150
PATIENCE_S = 30.0
TOLD = "notify.json"


class Watch:
    """The search's side: `ended` is called once, at the end."""

    def __init__(self, notify: Notify, study: str, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        if not notify.is_on:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paretune.service.notify.watch"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        known = {"study": study, "report": str(folder / "report.html"), "folder": str(folder)}
        self._write({"notify": notify.model_dump(), "known": known})

    def ended(self, event: Mapping[str, Any]) -> list[str]:
        """Tell the end; waits PATIENCE_S at most. Returns problems in words."""
        if self._process is None:
            return []
        self._write(event)
        process, self._process = self._process, None
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            return [f"the notification takes more than {PATIENCE_S:.0f} s and goes on by itself"]
        with contextlib.suppress(OSError, ValueError):
            return list(json.loads((self.folder / TOLD).read_text(encoding="utf-8"))["problems"])
        return ["the notification's process has failed"]

    def _write(self, data: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: `ended` says so
            self._process.stdin.write(json.dumps(data, default=str).encode() + b"\n")
            self._process.stdin.flush()


@contextlib.contextmanager
def watched(notify: Notify, study: str, folder: Path) -> Iterator[Watch]:
    """A watch that tells of an exception, too."""
    watch = Watch(notify, study, folder)
    try:
        yield watch
    except BaseException as error:
        watch.ended({"event": "ended", "state": "failed", "reason": f"{type(error).__name__}: {error}"[:500]})
        raise


def main() -> None:
    """Wait for the search to end, tell the receivers how it ended, and write the problems to notify.json."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    first, *rest = sys.stdin.buffer.read().splitlines() or [b""]
    if not first:
        return
    signal.alarm(LONGEST_S)  # waiting for the search has no end, telling has
    told = json.loads(first)
    event = json.loads(rest[0]) if rest else {"event": "died", "state": "died"}
    event = {**told["known"], "at": now(), **event}
    problems = tell(Notify(**told["notify"]), event)
    folder = Path(told["known"]["folder"])
    if folder.is_dir():
        write_atomically(folder / TOLD, json.dumps({"event": event, "problems": problems}, default=str).encode())


if __name__ == "__main__":
    main()
