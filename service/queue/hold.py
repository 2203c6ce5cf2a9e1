"""Holding the queue while the machine lacks disk or memory: what waits keeps its place and is tried again, never burnt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paretune.common.errors import DiskProblem
from paretune.common.files import disk_lack, disk_problem, free_bytes

# Held until so much more is free than when it began, or the pause is over; the pause doubles while nothing changes.
MORE_BYTES = 64 * 2**20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 600.0
LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class Condition:
    """How the part of the service that starts searches is. `reason` has no paths: it is told to strangers, too."""

    state: Literal["ok", "held", "failing", "stopped", "off"] = "ok"
    reason: str = ""


class Hold:
    """Whether searches are held back, and why. `pause_s` is the first pause."""

    def __init__(
        self, folder: Path, pause_s: float = FIRST_PAUSE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.first_pause_s, self.clock = folder, pause_s, clock
        self.reason = ""
        self._free, self._until, self._pause_s, self._looked = 0, 0.0, pause_s, 0.0

    def begin(self, reason: str) -> None:
        """Hold from now on. Again while it is held, or right after: twice as long."""
        self.reason = reason
        self._free, moment = free_bytes(self.folder), self.clock()
        self._until = self._looked = moment
        self._until += self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def forget(self) -> None:
        """A search has ended without a lack: the next pause is short again."""
        self._pause_s = self.first_pause_s

    def is_on(self) -> bool:
        """Whether to hold; looks at the disk itself, too."""
        moment = self.clock()
        if self.reason and moment - self._looked < min(LOOK_EVERY_S, self.first_pause_s):
            return True
        self._looked = moment
        lack = self.lack()
        if lack:
            if not self.reason:
                self._free = free_bytes(self.folder)
            self.reason, self._until = lack, moment
            return True
        if self.reason and moment < self._until and free_bytes(self.folder) < self._free + MORE_BYTES:
            return True
        self.reason = ""
        return False

    def lack(self) -> str:
        """What keeps a small file from being written, empty if nothing does."""
        error = disk_lack(self.folder)
        if error is None:
            return ""
        problem = disk_problem(OSError(error.errno, error.strerror))
        return (problem or DiskProblem(f"the disk cannot be written ({error.strerror})", "")).problem
