"""What carries out tasks: in earnest for decoders and plug-ins, or simulated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from paretune.common.errors import Infeasible, ParetuneError
from paretune.search.tasks.base import Outcome, Task, fatal
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.elastic import Elastic, ElasticResult
from paretune.search.tasks.evaluation import EvaluationResult
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.fit import Fit, FitResult
from paretune.search.tasks.recover import Recover, RecoverResult
from paretune.search.tasks.sensitivity import MeasureSensitivity, SensitivityResult


class Evaluator(ABC):
    """Does one task at a time. A candidate's own fault is an outcome; everything else that fails raises."""

    def run(self, task: Task) -> Outcome[Any]:
        """Do the task. Tasks that work in slices are to be run again until their outcome is done."""
        try:
            return task.run(self)
        except Infeasible as error:
            return Outcome("infeasible", reason=str(error))
        except ParetuneError as error:
            return fatal(error)

    @abstractmethod
    def fit(self, task: Fit) -> Outcome[FitResult]:
        """Time designed candidates for a slice of time."""

    @abstractmethod
    def elastic(self, task: Elastic) -> Outcome[ElasticResult]:
        """Train the elastic student for a slice of time."""

    def sensitivity(self, task: MeasureSensitivity) -> Outcome[SensitivityResult]:
        """Measure what groups of layers lose in each precision; "failed" where the model has no such groups."""
        return Outcome("failed", reason="this kind of model has no mixed precision")

    @abstractmethod
    def explore(self, task: Explore) -> Outcome[EvaluationResult]:
        """Score a candidate without training."""

    @abstractmethod
    def recover(self, task: Recover) -> Outcome[RecoverResult]:
        """Train a candidate."""

    @abstractmethod
    def confirm(self, task: Confirm) -> Outcome[EvaluationResult]:
        """Export a candidate, score it in its engine and time it."""

    def close(self) -> None:  # noqa: B027 (most hold nothing between tasks)
        """Give back what is held between tasks."""
