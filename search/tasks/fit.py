"""Measurements for the latency fit: designed candidates are timed on the target, all others are predicted from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from paretune.objectives.prediction.latency_fit import design
from paretune.search.estimation.state import SearchState
from paretune.search.tasks.base import Outcome, Task, limits
from paretune.spaces.kinds import AnyCandidate


@dataclass(frozen=True)
class FitResult:
    """`kept`: what is measured of models like this one on the target, each {"candidate", and milliseconds by name}.

    `missing` candidates had no time left, `refused` holds the engine's reasons, and `disturbed` counts measurements that other
    work on the machine disturbed.
    """

    kept: tuple[Mapping[str, Any], ...] = ()
    missing: int = 0
    disturbed: int = 0
    refused: tuple[str, ...] = ()


class FitEvaluator(Protocol):
    """Who can time candidates."""

    def fit(self, task: Fit) -> Outcome[FitResult]:
        """Time designed candidates for a slice of time; call again until the outcome is done."""


@dataclass(frozen=True)
class Fit(Task):
    """Time the `designed` candidates, for `seconds` in all."""

    kind: ClassVar[str] = "fit"
    stage: ClassVar[str] = "latency fit"
    most_s: ClassVar[float | None] = 300.0
    is_sliced: ClassVar[bool] = True
    is_timed: ClassVar[bool] = True
    designed: tuple[AnyCandidate, ...] = ()
    seconds: float = 0.0

    @classmethod
    def is_due(cls, state: SearchState) -> bool:
        """Until the study has a fit."""
        return not state.has_fit

    @classmethod
    def of(cls, state: SearchState) -> Fit:
        """The task with the study's design."""
        designed = tuple(design(state.space, state.spec.fit_points, state.spec.seed))
        return cls(designed, state.costs.fit_seconds(), **limits(state, cls))

    def run(self, evaluator: FitEvaluator) -> Outcome[FitResult]:
        """Time them."""
        return evaluator.fit(self)

    def progressed(self, state: SearchState, outcome: Outcome[FitResult]) -> None:
        """Say how many are left."""
        missing = 0 if outcome.result is None else outcome.result.missing
        state.notify("progress", {"kind": self.kind, "missing": missing})

    def completed(self, state: SearchState, outcome: Outcome[FitResult], seconds: float) -> None:
        """Keep the measurements and fit the latencies."""
        found = outcome.result
        if outcome.status != "complete" or found is None:
            state.give_up(f"the latency fit could not be measured: {outcome.reason}", 1)
            return
        state.store.set_meta(fit_done=True, fit_points=[dict(point) for point in found.kept])
        if found.refused:
            state.store.event(
                "fit", f"the engine refused {len(found.refused)} of the fit's candidates: {found.refused[0]}"
            )
        state.estimates.refit()
        fits = state.estimates.fits
        if not fits:
            state.give_up("the machine was too busy to measure anything for the latency fit", 5)
        if found.disturbed:
            state.store.event(
                "fit",
                f"{found.disturbed} of the fit's measurements were disturbed by other work; predictions are rough",
            )
        for name, fit in fits.items():
            e = fit.error
            state.store.event(
                "fit",
                f"latency fit of {name}: held-out error {e.median:.1%} median, {e.worst:.1%} worst, Kendall tau "
                f"{e.kendall_tau:.2f} (parameters x bits: {e.params_bits_tau:.2f}) over {e.points} measurements",
            )
        state.notify("fit", {name: fit.error.__dict__ for name, fit in fits.items()})
