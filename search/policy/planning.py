"""What is due next.

Order: the baselines are confirmed, the latency fit is measured, the elastic student trained, the sensitivity table measured;
then rung-0 candidates and recoveries with confirmations take turns by their shares of the budget. Everything is read from
the ledger and the store.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from paretune.objectives.prediction.latency_fit import design
from paretune.search.budget import Budget
from paretune.search.policy.costs import Costs
from paretune.search.policy.estimates import Estimates
from paretune.search.policy.finalists import next_finalist
from paretune.search.policy.ledger import MAX_ATTEMPTS, Ledger
from paretune.search.spec import Spec
from paretune.search.study.store import Store
from paretune.search.task import Kind, Task
from paretune.spaces.kinds import AnyCandidate, AnySpace, params_of
from paretune.spaces.space import Space

FIRST_WAVE = 40


@dataclass(frozen=True)
class Decision:
    """`kind`: do the `task` ("work"), make a proposal ("propose"), let something finish ("wait"), or end ("done")."""

    kind: Literal["work", "propose", "wait", "done"]
    task: Task | None = None
    reason: str = ""


class Planning:
    """Proposes the next piece of work; the director hands it out."""

    def __init__(
        self, store: Store, spec: Spec, space: AnySpace, budget: Budget, ledger: Ledger, estimates: Estimates
    ) -> None:
        self.store, self.spec, self.space, self.budget = store, spec, space, budget
        self.ledger, self.estimates = ledger, estimates
        self.costs = Costs(store, spec, space.shape, budget, ledger)

    def due(self) -> Decision:
        """The next thing to do."""
        if self.budget.left_s <= 0:
            return _end("the budget has ended")
        baseline = self._baseline_due()
        if baseline is not None:
            return self.task("confirm", baseline)
        if self.store.meta("fit_done") is not True:
            return self.task("fit", None, {"design": self._design(), "seconds": self.costs.fit_seconds()})
        if self.store.meta("elastic", {}).get("done") is not True:
            return self.task("elastic", None)
        space = self.space
        if isinstance(space, Space) and space.has_mixed and space.sensitivity is None:
            return self.task("sensitivity", None, {"formats": [asdict(f) for f in space.mixed_formats]})
        return self._explore_or_confirm()

    def task(self, kind: Kind, candidate: AnyCandidate | None, options: dict[str, Any] | None = None) -> Decision:
        """The decision to do a piece of work."""
        return Decision("work", Task(kind, candidate, self.budget.left_s, self.costs.timeout_s(kind), options or {}))

    def _baseline_due(self) -> AnyCandidate | None:
        for candidate in self.space.baselines():
            if candidate.key not in self.ledger.rows:
                self.ledger.add(candidate, "baseline", params_of(self.space, candidate))
            if self.ledger.is_open(candidate.key, "confirmed"):
                return candidate
        return None

    def _explore_or_confirm(self) -> Decision:
        left, cost = self.budget.left_s, self.costs.confirm_cost_s()
        waiting = self.unconfirmed()
        if waiting is not None:
            return waiting
        pending = next(
            (
                row
                for row in self.ledger.rows.values()
                if row.source != "baseline" and self.ledger.is_open(row.key, "rung0")
            ),
            None,
        )
        if pending is not None:
            return self.task("rung0", pending.candidate)
        number, finalist = len(self.ledger.explored_keys()), None
        most = self.spec.max_candidates
        if left >= cost and self._first_wave_is_over(number) and (number >= most or self._confirm_is_behind()):
            finalist = self._next_finalist()
        can_explore = number < most and not self.store.meta("exhausted", False)
        if finalist is None and can_explore and left >= cost + self.costs.rung0_s():
            return Decision("propose")
        if finalist is None and left >= cost:
            finalist = self._next_finalist()
        if finalist is None:
            again = self._disturbed()
            if again is not None and left >= self.costs.confirmation_s():
                recovered = self.ledger.latest.get((again, "recovered"))
                return self.task(
                    "confirm", self.ledger.rows[again].candidate, {"recovered": recovered.facts} if recovered else {}
                )
            return _end("all is done" if left >= cost else "the budget has ended")
        stakes = self.estimates.stakes(finalist)
        options = {"tokens": self.costs.recovery_tokens(), **({"stakes": stakes.to_dict()} if stakes else {})}
        return self.task("recover", self.ledger.rows[finalist].candidate, options)

    def unconfirmed(self) -> Decision | None:
        """Return the confirmation of a recovered candidate, the end if time is too short; None if none is recovered."""
        for (key, fidelity), e in self.ledger.latest.items():
            if fidelity == "recovered" and e.status == "complete" and self.ledger.is_open(key, "confirmed"):
                if self.budget.left_s < self.costs.confirmation_s():
                    return _end("the budget has ended")
                return self.task("confirm", self.ledger.rows[key].candidate, {"recovered": e.facts})
        return None

    def _disturbed(self) -> str | None:
        """A confirmed candidate whose latency was disturbed or whose agent was away, baselines first, to be measured again."""
        for key in self.ledger.rows:
            e = self.ledger.latest.get((key, "confirmed"))
            if e is None or e.status != "complete" or e.attempt >= MAX_ATTEMPTS:
                continue
            latency = e.measurements[self.estimates.figures.latency]
            if latency.provenance == "disturbed" or latency.is_left_predicted:
                return key
        return None

    def _first_wave_is_over(self, number: int) -> bool:
        """Whether enough is explored to choose finalists from: FIRST_WAVE candidates, or on a slow machine half of the time for it."""
        half = self.spec.shares.explore * self.budget.total_s / 2
        return number >= min(FIRST_WAVE, self.spec.max_candidates) or self.budget.used("explore") >= half

    def _confirm_is_behind(self) -> bool:
        """Whether the next confirmation is due by the two stages' shares of the time."""
        shares = self.spec.shares
        later = self.budget.used("recover and confirm") + self.costs.confirm_cost_s() / 2
        return later / shares.confirm <= self.budget.used("explore") / shares.explore

    def _next_finalist(self) -> str | None:
        chosen = [key for (key, fidelity) in self.ledger.latest if fidelity == "recovered"]
        if len(chosen) >= self.spec.most_finalists:
            return None
        again = next((key for key in chosen if self.ledger.is_open(key, "recovered")), None)
        confirmed = [self.estimates.confirmed_vector(e) for e in self.ledger.complete("confirmed")]
        return again or next_finalist(self.estimates.explored(), chosen, confirmed, self.estimates.perceived)

    def _design(self) -> list[dict[str, Any]]:
        points = design(self.space, self.spec.fit_points, self.spec.seed)
        return [json.loads(c.to_json()) for c in points]


def _end(reason: str) -> Decision:
    return Decision("done", reason=reason)
