"""Memory that this machine, and the control group that holds this process, have."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that this machine, and the control group that holds us, have left."""
    return min(_left_on_machine(), _left_in_group())


def all_memory() -> int:
    """Bytes of memory that this machine, or the control group that holds us, has in all."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        return min(machine, int((CONTROL_GROUP / "memory.max").read_text(encoding="utf-8")))
    return machine


def _left_on_machine() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def _left_in_group() -> int:
    """By cgroup v2; file pages that can be dropped count as free. No limit where there is none, or it cannot be read."""
    try:
        most, used = (
            (CONTROL_GROUP / f"memory.{name}").read_text(encoding="utf-8").strip() for name in ("max", "current")
        )
        stat = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
        return sys.maxsize if most == "max" else int(most) - int(used) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return sys.maxsize
