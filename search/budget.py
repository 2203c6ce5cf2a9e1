"""Wall-clock time: what is left, what each stage has used. Only the monotonic clock counts, so clock changes do not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Stage = str
TAIL_S = 4.0
# So much later work is ended that should have ended itself; what is over by more than OVER_S is said.
GRACE_S, OVER_S = 3.0, 5.0


@dataclass
class Budget:
    """`total_s` for the whole study; `spent_s` what earlier launches of it used. `clock` is replaceable in tests."""

    total_s: float
    spent_s: float = 0.0
    stages: dict[Stage, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def elapsed_s(self) -> float:
        """Seconds of this study so far, over all launches."""
        return self.spent_s + self.clock() - self._start

    @property
    def left_s(self) -> float:
        """Seconds until work must end; a few are kept back for the last report."""
        return max(0.0, self.total_s - TAIL_S - self.elapsed_s)

    @property
    def over(self) -> str:
        """How far the time used is over the budget, in words; empty where it is not, or by seconds only."""
        over = self.elapsed_s - self.total_s
        return f"{self.elapsed_s:.0f} s were used of a budget of {self.total_s:.0f} s" if over > OVER_S else ""

    def charge(self, stage: Stage, seconds: float) -> None:
        """Add `seconds` to what a stage has used."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def used(self, *stages: Stage) -> float:
        """Return the seconds that these stages have used together."""
        return sum(self.stages.get(stage, 0.0) for stage in stages)
