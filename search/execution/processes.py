"""The processes of a launch, by id and start time, so that the next launch can end what a SIGKILL left behind."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def descendants(pid: int) -> list[tuple[int, int]]:
    """(pid, start time in clock ticks since boot) of all living descendants of a process."""
    parents = {int(path.name): fields for path in Path("/proc").glob("[0-9]*") if (fields := _stat(int(path.name)))}
    found, fresh = [], {pid}
    while fresh:
        fresh = {child for child, (parent, _) in parents.items() if parent in fresh}
        found += [(child, parents[child][1]) for child in fresh]
    return found


def end_survivors(processes: list[tuple[int, int]]) -> int:
    """Kill those of `processes` that still live (the start time guards against a reused pid); returns how many."""
    ended = 0
    for pid, started in processes:
        fields = _stat(pid)
        if fields is not None and fields[1] == started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                ended += 1
    return ended


def _stat(pid: int) -> tuple[int, int] | None:
    """(parent, start time) of a process, or None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        return int(fields[1]), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
