"""Tasks that evaluate one candidate at one fidelity; what comes back is an evaluation in the study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores
from paretune.search.estimation.ledger import MAX_ATTEMPTS
from paretune.search.estimation.state import SearchState
from paretune.search.study.records import Fidelity
from paretune.search.tasks.base import Outcome, Task
from paretune.spaces.kinds import AnyCandidate

Details = Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found. `details` is kept with the evaluation for readers; the search decides nothing by it.

    `artifact` is the folder of an exported model with the SHA-256 of its checksums.
    """

    scores: Scores | None = None
    measurements: Mapping[str, Measurement] = field(default_factory=dict)
    details: Details = field(default_factory=dict)
    artifact: tuple[str, str] | None = None

    def facts(self) -> dict[str, Any]:
        """What is kept with the evaluation, as JSON."""
        return dict(self.details)


E = TypeVar("E", bound=EvaluationResult)


@dataclass(frozen=True)
class EvaluationTask(Task, Generic[E]):
    """The evaluation of `candidate`."""

    fidelity: ClassVar[Fidelity]
    candidate: AnyCandidate

    @property
    def subject(self) -> AnyCandidate:
        """The candidate."""
        return self.candidate

    def started(self, state: SearchState) -> None:
        """Count the attempt."""
        state.store.start(self.candidate.key, self.fidelity)

    def completed(self, state: SearchState, outcome: Outcome[E], seconds: float) -> None:
        """Keep the evaluation."""
        key, found = self.candidate.key, outcome.result
        measurements = {} if found is None else self.measured(state, found)
        artifact = None if found is None or found.artifact is None else found.artifact[1]
        is_complete = outcome.status == "complete"
        state.store.finish(
            key,
            self.fidelity,
            "lost" if outcome.status == "fatal" else outcome.status,
            measurements=measurements,
            scores=None if found is None else found.scores,
            facts={} if found is None else found.facts(),
            reason=outcome.reason,
            seconds=seconds,
            publish=is_complete and self.fidelity == "confirmed",
            artifact=None if artifact is None else (state.store.folder / "artifacts" / key, artifact),
        )
        state.ledger.refresh(key, self.fidelity)
        state.require_teacher(key, outcome.reason)
        if found is not None and found.details.get("idle_masks"):
            state.store.event("nothing changed", f"the pattern drops no weight: {self.candidate.describe()}")
        if is_complete:
            self.learned(state, measurements)
        state.notify(self.fidelity, {"key": key, "status": outcome.status, "reason": outcome.reason})

    def lost(self, state: SearchState, reason: str, seconds: float) -> None:
        """Count the attempt; after MAX_ATTEMPTS the evaluation has failed."""
        key = self.candidate.key
        before = state.ledger.latest.get((key, self.fidelity))
        is_last = before is not None and before.attempt + 1 >= MAX_ATTEMPTS
        state.store.finish(key, self.fidelity, "failed" if is_last else "lost", reason=reason, seconds=seconds)
        state.ledger.refresh(key, self.fidelity)
        state.require_teacher(key, reason)

    def measured(self, state: SearchState, found: E) -> dict[str, Measurement]:
        """The measurements to keep."""
        return dict(found.measurements)

    def learned(self, state: SearchState, measurements: dict[str, Measurement]) -> None:
        """A complete evaluation changes what is expected of others."""
