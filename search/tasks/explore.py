"""Rung 0: the quality of a candidate with the elastic student's weights, without training. Its latency is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from paretune.objectives.measurement import Measurement
from paretune.search.estimation.state import SearchState
from paretune.search.study.records import Fidelity
from paretune.search.tasks.base import Outcome, limits
from paretune.search.tasks.evaluation import EvaluationResult, EvaluationTask
from paretune.spaces.kinds import AnyCandidate


class ExploreEvaluator(Protocol):
    """Who can explore."""

    def explore(self, task: Explore) -> Outcome[EvaluationResult]:
        """Score a candidate on the search split."""


@dataclass(frozen=True)
class Explore(EvaluationTask[EvaluationResult]):
    """Scores and sizes of `candidate`."""

    kind: ClassVar[str] = "rung0"
    stage: ClassVar[str] = "explore"
    fidelity: ClassVar[Fidelity] = "rung0"
    most_s: ClassVar[float | None] = 120.0

    @classmethod
    def of(cls, state: SearchState, candidate: AnyCandidate) -> Explore:
        """The task with what is left of the budget."""
        return cls(candidate, **limits(state, cls))

    def run(self, evaluator: ExploreEvaluator) -> Outcome[EvaluationResult]:
        """Score it."""
        return evaluator.explore(self)

    def measured(self, state: SearchState, found: EvaluationResult) -> dict[str, Measurement]:
        """With the predicted latencies, what follows from them, and the estimated quality, for readers of the study."""
        if found.scores is None:
            return {}
        estimates = state.estimates
        return {
            **estimates.completed(self.candidate, found.measurements),
            estimates.figures.estimate: estimates.estimated_nll(self.candidate, found.scores),
        }
