"""Recovery: distil a chosen candidate from the teacher, under its rounding where that pays (QAT)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from paretune.search.escalation import QatContext
from paretune.search.estimation.state import SearchState
from paretune.search.study.records import Fidelity
from paretune.search.tasks.base import Outcome, limits
from paretune.search.tasks.evaluation import EvaluationResult, EvaluationTask


@dataclass(frozen=True)
class Recovered:
    """Trained weights: their file, the tokens (a plug-in's examples) seen, and whether the rounding was part of the training."""

    file: str
    tokens: float
    qat: bool = False
    qat_reason: str = ""

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Recovered:
        """What a complete recovery left in the study."""
        return cls(facts["file"], facts["tokens"], bool(facts.get("qat", False)), facts.get("qat_reason", ""))


@dataclass(frozen=True)
class RecoverResult(EvaluationResult):
    """The better of the weights before and after training; None if training did not come to its end."""

    recovered: Recovered | None = None

    def facts(self) -> dict[str, Any]:
        """With where the weights are and how they were trained."""
        return {**self.details, **({} if self.recovered is None else self.recovered.__dict__)}


class RecoverEvaluator(Protocol):
    """Who can recover."""

    def recover(self, task: Recover) -> Outcome[RecoverResult]:
        """Train a candidate."""


@dataclass(frozen=True)
class Recover(EvaluationTask[RecoverResult]):
    """The training of `candidate` on `tokens` tokens (a plug-in's: examples). `context` decides about QAT; None: by its bits."""

    kind: ClassVar[str] = "recover"
    stage: ClassVar[str] = "recover and confirm"
    fidelity: ClassVar[Fidelity] = "recovered"
    tokens: int = 0
    context: QatContext | None = None

    @classmethod
    def of(cls, state: SearchState, key: str) -> Recover:
        """The task for an explored candidate, with the study's number of tokens."""
        candidate, context = state.ledger.rows[key].candidate, state.estimates.qat_context(key)
        return cls(candidate, state.costs.recovery_tokens(), context, **limits(state, cls))

    def run(self, evaluator: RecoverEvaluator) -> Outcome[RecoverResult]:
        """Train it."""
        return evaluator.recover(self)
