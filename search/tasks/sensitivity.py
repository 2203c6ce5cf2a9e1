"""The sensitivity table: what every group of layers loses in every precision, which opens the space's mixed precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from paretune.search.estimation.ledger import MAX_ATTEMPTS
from paretune.search.estimation.state import SearchState
from paretune.search.tasks.base import Outcome, Task, limits
from paretune.spaces.candidate import Format
from paretune.spaces.mixed import Sensitivity
from paretune.spaces.space import Space

LOST = "sensitivity_lost"


@dataclass(frozen=True)
class SensitivityResult:
    """The table, the seconds it took, and whether an earlier search had measured it."""

    table: Sensitivity
    seconds: float
    is_kept: bool = False


class SensitivityEvaluator(Protocol):
    """Who can measure the table."""

    def sensitivity(self, task: MeasureSensitivity) -> Outcome[SensitivityResult]:
        """Measure the table."""


@dataclass(frozen=True)
class MeasureSensitivity(Task):
    """Measure the table for `formats`."""

    kind: ClassVar[str] = "sensitivity"
    stage: ClassVar[str] = "sensitivity"
    most_s: ClassVar[float | None] = 300.0
    formats: tuple[Format, ...] = ()

    @classmethod
    def is_due(cls, state: SearchState) -> bool:
        """If the space has mixed precision, until the study has the table."""
        return state.needs_sensitivity

    @classmethod
    def of(cls, state: SearchState) -> MeasureSensitivity:
        """The task for the formats of the space's mixed precision."""
        space = state.space
        assert isinstance(space, Space)
        return cls(tuple(space.mixed_formats), **limits(state, cls))

    def run(self, evaluator: SensitivityEvaluator) -> Outcome[SensitivityResult]:
        """Measure it."""
        return evaluator.sensitivity(self)

    def completed(self, state: SearchState, outcome: Outcome[SensitivityResult], seconds: float) -> None:
        """The table opens the mixed part of the space; without it the search goes on with uniform precision."""
        found, told = outcome.result, {}
        if outcome.status == "complete" and found is not None:
            told = {"kept": found.is_kept, "seconds": found.seconds}
            state.store.set_meta(sensitivity={"table": found.table.to_dict(), **told})
            group, form, loss = found.table.worst()
            source = "taken from an earlier search" if found.is_kept else "measured"
            state.store.event(
                "sensitivity", f"sensitivity table {source}; {group} in {form.label} loses most, {loss:.3g} nats"
            )
        elif outcome.status != "fatal":
            state.store.set_meta(sensitivity={"table": None, "reason": outcome.reason})
            state.store.event("sensitivity", f"no mixed precision is searched: {outcome.reason}")
        state.open_mixed()
        state.notify("sensitivity", {"reason": outcome.reason, **told})

    def lost(self, state: SearchState, reason: str, seconds: float) -> None:
        """After MAX_ATTEMPTS the search goes on without the table."""
        lost = int(state.store.meta(LOST, 0)) + 1
        state.store.set_meta(**{LOST: lost})
        if lost >= MAX_ATTEMPTS:
            self.completed(state, Outcome("failed", reason=reason), seconds)
