"""What all kinds of tasks have in common: the task, its outcome, and the evaluator that carries it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from paretune.common.errors import ParetuneError
from paretune.search.estimation.state import SearchState
from paretune.spaces.kinds import AnyCandidate

Status = Literal["complete", "failed", "infeasible", "fatal"]
R = TypeVar("R")


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What came of a task.

    `result` is there if the task is complete, and in a report on the way, whose `done` is False. "infeasible" means that the
    candidate cannot be built or run, "failed" that this attempt went wrong; "fatal" ends the search with `exit_code`.
    """

    status: Status = "complete"
    result: R | None = None
    done: bool = True
    reason: str = ""
    exit_code: int = 0
    remedy: str = ""

    @property
    def found(self) -> R:
        """The result. Raises ValueError with the reason if there is none."""
        if self.result is None:
            raise ValueError(f"the task is {self.status}: {self.reason}")
        return self.result


def fatal(error: ParetuneError) -> Outcome[Any]:
    """The outcome that ends the search with the error's exit code; the remedy is kept apart from the reason."""
    return Outcome("fatal", reason=error.problem, exit_code=error.exit_code, remedy=error.remedy)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What one Ray Tune trial does.

    A kind of task is a subclass in a module of its own. `seconds_left` is how much of the budget remains, `timeout_s` after how
    long the worker ends itself; both in seconds.
    """

    kind: ClassVar[str]
    # What readers of the study see while it is done, and under which its time is counted.
    stage: ClassVar[str]
    # Longest time for the reference model of estimation/costs.py, or None for the rest of the budget.
    most_s: ClassVar[float | None] = None
    # Works in slices and keeps its state on disk, so it may be ended at any time.
    is_sliced: ClassVar[bool] = False
    # Times the target machine, which does one such task at a time.
    is_timed: ClassVar[bool] = False
    seconds_left: float = 0.0
    timeout_s: float = 600.0

    @property
    def subject(self) -> AnyCandidate | None:
        """The candidate that the task is about, if it is about one."""
        return None

    @property
    def name(self) -> str:
        """What tells tasks in flight apart: the kind, and the candidate's key."""
        return self.kind if self.subject is None else f"{self.kind} {self.subject.key}"

    def stage_in(self, state: SearchState) -> str:
        """What readers see while the task is done in this study."""
        return self.stage

    @abstractmethod
    def run(self, evaluator: Any) -> Outcome[Any]:
        """Let the worker's evaluator do it."""

    @abstractmethod
    def completed(self, state: SearchState, outcome: Outcome[Any], seconds: float) -> None:
        """Write what came of it into the study; `seconds` is what it took."""

    def started(self, state: SearchState) -> None:  # noqa: B027 (most kinds do nothing)
        """It is handed out."""

    def progressed(self, state: SearchState, outcome: Outcome[Any]) -> None:  # noqa: B027 (most kinds do nothing)
        """A report on the way."""

    def lost(self, state: SearchState, reason: str, seconds: float) -> None:  # noqa: B027 (what is due is read from the study)
        """Its worker died or hung; it becomes due again."""


def limits(state: SearchState, task: type[Task]) -> dict[str, float]:
    """The budget that is left and the timeout of a task of this kind, as its keyword arguments."""
    return {"seconds_left": state.budget.left_s, "timeout_s": state.costs.timeout_s(task.most_s)}
