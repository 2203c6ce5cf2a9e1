"""Confirmation: export a candidate, score the exported model in its engine, and time it on the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from paretune.objectives.measurement import Measurement
from paretune.search.estimation.state import SearchState
from paretune.search.study.records import Fidelity
from paretune.search.tasks.base import Outcome, limits
from paretune.search.tasks.evaluation import EvaluationResult, EvaluationTask
from paretune.search.tasks.recover import Recovered


class ConfirmEvaluator(Protocol):
    """Who can confirm."""

    def confirm(self, task: Confirm) -> Outcome[EvaluationResult]:
        """Export, score and time a candidate."""


@dataclass(frozen=True)
class Confirm(EvaluationTask[EvaluationResult]):
    """The artifact of `candidate` with its `recovered` weights, or with the teacher's own."""

    kind: ClassVar[str] = "confirm"
    stage: ClassVar[str] = "recover and confirm"
    fidelity: ClassVar[Fidelity] = "confirmed"
    most_s: ClassVar[float | None] = 900.0
    is_timed: ClassVar[bool] = True
    recovered: Recovered | None = None

    @classmethod
    def of(cls, state: SearchState, key: str) -> Confirm:
        """The task for a candidate of the study, with its recovered weights if there are any."""
        e = state.ledger.latest.get((key, "recovered"))
        recovered = None if e is None or e.status != "complete" else Recovered.from_facts(e.facts)
        return cls(state.ledger.rows[key].candidate, recovered, **limits(state, cls))

    def stage_in(self, state: SearchState) -> str:
        """The baselines have a stage of their own."""
        return "baselines" if state.ledger.rows[self.candidate.key].source == "baseline" else self.stage

    def run(self, evaluator: ConfirmEvaluator) -> Outcome[EvaluationResult]:
        """Export, score and time it."""
        return evaluator.confirm(self)

    def learned(self, state: SearchState, measurements: dict[str, Measurement]) -> None:
        """It sharpens the latency fit and the calibration."""
        state.estimates.learn(self.candidate, measurements)
