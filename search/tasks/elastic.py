"""The elastic student, from whose weights every smaller candidate is cut. A plug-in has none: its training speed is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from paretune.search.estimation.state import SearchState
from paretune.search.tasks.base import Outcome, Task, limits


@dataclass(frozen=True)
class ElasticResult:
    """Training so far: seconds and tokens (a plug-in's examples), the last loss in nats per token, the tokens of a batch.

    `seconds` is how long it shall last in all; `is_kept` says that an earlier search had trained it to the end. `file` is where
    the weights are; `threads` is how many trained them.
    """

    elapsed_s: float
    tokens: float
    batch_tokens: int
    is_kept: bool = False
    seconds: float | None = None
    loss: float | None = None
    file: str | None = None
    threads: int | None = None

    def facts(self) -> dict[str, Any]:
        """What the study keeps, as JSON."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        return {**found, "kept": found.pop("is_kept")}


class ElasticEvaluator(Protocol):
    """Who can train the elastic student."""

    def elastic(self, task: Elastic) -> Outcome[ElasticResult]:
        """Train it for a slice of time; call again until the outcome is done."""


@dataclass(frozen=True)
class Elastic(Task):
    """Train the elastic student to its end."""

    kind: ClassVar[str] = "elastic"
    stage: ClassVar[str] = "elastic student"
    most_s: ClassVar[float | None] = 300.0
    is_sliced: ClassVar[bool] = True

    @classmethod
    def is_due(cls, state: SearchState) -> bool:
        """Until it is trained."""
        return not state.has_elastic

    @classmethod
    def of(cls, state: SearchState) -> Elastic:
        """The task with what is left of the budget."""
        return cls(**limits(state, cls))

    def stage_in(self, state: SearchState) -> str:
        """For a plug-in only a speed is measured."""
        return self.stage if state.space.has_elastic else "training speed"

    def run(self, evaluator: ElasticEvaluator) -> Outcome[ElasticResult]:
        """Train it."""
        return evaluator.elastic(self)

    def progressed(self, state: SearchState, outcome: Outcome[ElasticResult]) -> None:
        """Keep how far it is."""
        facts = {} if outcome.result is None else outcome.result.facts()
        state.store.set_meta(elastic={**facts, "done": False})
        state.notify("progress", {"kind": self.kind, **facts})

    def completed(self, state: SearchState, outcome: Outcome[ElasticResult], seconds: float) -> None:
        """Keep its speed, from which recoveries are planned."""
        found = outcome.result
        if outcome.status != "complete" or found is None:
            if state.budget.left_s > 1:
                state.give_up(f"the elastic student could not be trained: {outcome.reason}", 1)
            return
        state.store.set_meta(elastic={**found.facts(), "done": True})
        if not state.space.has_elastic:
            text = f"training speed {found.tokens / max(found.elapsed_s, 1e-9):,.0f} examples/s"
        elif found.is_kept:
            text = "elastic student taken from an earlier search"
        else:
            text = f"elastic student trained for {found.elapsed_s:.0f} s on {found.tokens:,.0f} tokens"
        state.store.event("elastic", text)
        state.notify("elastic", {"done": True, "trained": state.space.has_elastic, **found.facts()})
