"""Which task is due next.

Order: the baselines are confirmed, the latency fit is measured, the elastic student trained, the sensitivity table measured;
then rung-0 candidates and recoveries with confirmations take turns by their shares of the budget. With several workers each of
these begins as soon as what it needs is known; one task at a time may use the target for timing. Everything is read from the
ledger and the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from paretune.search.estimation.finalists import next_finalist
from paretune.search.estimation.ledger import MAX_ATTEMPTS
from paretune.search.estimation.state import SearchState
from paretune.search.tasks.base import Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.kinds import PREPARATIONS
from paretune.search.tasks.recover import Recover
from paretune.spaces.kinds import AnyCandidate, params_of

FIRST_WAVE = 40
# Candidates of the teacher's size that are explored while the elastic student is trained.
FULL_SIZE_WAVE = 16
Out = Mapping[str, Task]


@dataclass(frozen=True)
class Decision:
    """`kind`: do the `task` ("work"), make a proposal ("propose"), let something finish ("wait"), or end ("done").

    `full_size` restricts a proposal to the teacher's size.
    """

    kind: Literal["work", "propose", "wait", "done"]
    task: Task | None = None
    reason: str = ""
    full_size: bool = False


class Planning:
    """Proposes the next task; the director hands it out."""

    def __init__(self, state: SearchState) -> None:
        self.state = state

    def due(self, out: Out) -> Decision:
        """The next thing to do while the tasks `out` are in flight."""
        if self.state.budget.left_s <= 0:
            return _end("the budget has ended")
        baseline = self._baseline_due()
        due = [kind for kind in PREPARATIONS if kind.is_due(self.state)]
        if baseline is not None and self._can_begin(Confirm, out):
            return Decision("work", Confirm.of(self.state, baseline.key))
        ready = next((kind for kind in due if self._can_begin(kind, out)), None)
        if ready is not None:
            return Decision("work", ready.of(self.state))
        if baseline is not None or due:
            return self._ahead(out)
        return self._explore_or_confirm(out)

    @staticmethod
    def _can_begin(kind: type[Task], out: Out) -> bool:
        """Whether a preparation is not in flight, and the target is free if it needs that."""
        return not any(isinstance(task, kind) or (kind.is_timed and task.is_timed) for task in out.values())

    def _ahead(self, out: Out) -> Decision:
        """What can be explored while others are still preparing: candidates of the teacher's size need no elastic student."""
        state = self.state
        if (
            not state.teacher_is_confirmed
            or not state.has_fit
            or state.needs_sensitivity
            or not state.space.has_elastic
        ):
            return Decision("wait")
        number = len(state.ledger.explored_keys()) + _count(out, Explore)
        if number >= min(FULL_SIZE_WAVE, state.spec.max_candidates):
            return Decision("wait")
        return Decision("propose", full_size=True)

    def _baseline_due(self) -> AnyCandidate | None:
        for candidate in self.state.estimates.baselines:
            if candidate.key not in self.state.ledger.rows:
                self.state.ledger.add(candidate, "baseline", params_of(self.state.space, candidate))
            if self.state.ledger.is_open(candidate.key, "confirmed"):
                return candidate
        return None

    def _explore_or_confirm(self, out: Out) -> Decision:
        state, costs, ledger = self.state, self.state.costs, self.state.ledger
        left, cost = state.budget.left_s, costs.confirm_cost_s() + self._backlog_s(out)
        waiting = self.unconfirmed(out)
        if waiting is not None and (waiting.kind == "done" or timing_is_free(out)):
            return waiting if waiting.kind == "work" else _end_or_wait(waiting.reason, out)
        pending = self._unexplored(out)
        if pending is not None:
            return Decision("work", Explore.of(state, pending))
        number, finalist = len(ledger.explored_keys()) + _count(out, Explore), None
        most = state.spec.max_candidates
        if left >= cost and self._first_wave_is_over(number) and (number >= most or self._confirm_is_behind(out)):
            finalist = self._next_finalist(out)
        can_explore = number < most and not state.store.meta("exhausted", False)
        if finalist is None and can_explore and left >= cost + costs.rung0_s():
            return Decision("propose")
        if finalist is None and left >= cost:
            finalist = self._next_finalist(out)
        if finalist is not None:
            return Decision("work", Recover.of(state, finalist))
        again = self._disturbed()
        if again is not None and left >= costs.confirmation_s() and not out:
            return Decision("work", Confirm.of(state, again))
        return _end_or_wait("all is done" if left >= cost else "the budget has ended", out)

    def unconfirmed(self, out: Out) -> Decision | None:
        """The confirmation of a recovered candidate that is not in flight, the end if time is too short; None if none is recovered."""
        state = self.state
        for (key, fidelity), e in state.ledger.latest.items():
            if fidelity == "recovered" and e.status == "complete" and state.ledger.is_open(key, "confirmed"):
                if state.budget.left_s < state.costs.confirmation_s():
                    return _end("the budget has ended")
                task = Confirm.of(state, key)
                if task.name not in out:
                    return Decision("work", task)
        return None

    def _unexplored(self, out: Out) -> AnyCandidate | None:
        """A candidate that was proposed and lost."""
        ledger = self.state.ledger
        taken = {task.subject.key for task in out.values() if isinstance(task, Explore)}
        return next(
            (
                row.candidate
                for row in ledger.rows.values()
                if row.source != "baseline" and row.key not in taken and ledger.is_open(row.key, "rung0")
            ),
            None,
        )

    def _backlog_s(self, out: Out) -> float:
        """Seconds in which the target is busy with confirmations of what is recovered or being recovered."""
        ledger = self.state.ledger
        waiting = sum(
            1
            for (key, fidelity), e in ledger.latest.items()
            if fidelity == "recovered" and e.status == "complete" and ledger.is_open(key, "confirmed")
        )
        return (waiting + _count(out, Recover)) * self.state.costs.confirmation_s()

    def _disturbed(self) -> str | None:
        """A confirmed candidate whose latency was disturbed or whose agent was away, baselines first, to be measured again."""
        for key in self.state.ledger.rows:
            e = self.state.ledger.latest.get((key, "confirmed"))
            if e is None or e.status != "complete" or e.attempt >= MAX_ATTEMPTS:
                continue
            latency = e.measurements[self.state.estimates.figures.latency]
            if latency.provenance == "disturbed" or latency.is_left_predicted:
                return key
        return None

    def _first_wave_is_over(self, number: int) -> bool:
        """Whether enough is explored to choose finalists from: FIRST_WAVE candidates, or on a slow machine half of the time for it."""
        state = self.state
        half = state.spec.shares.explore * state.budget.total_s * state.workers / 2
        return number >= min(FIRST_WAVE, state.spec.max_candidates) or state.budget.used(Explore.stage) >= half

    def _confirm_is_behind(self, out: Out) -> bool:
        """Whether the next confirmation is due by the two stages' shares of the time; those in flight count as done."""
        shares, budget, costs = self.state.spec.shares, self.state.budget, self.state.costs
        later = budget.used(Confirm.stage) + (_count(out, Recover) + 0.5) * costs.confirm_cost_s()
        return later / shares.confirm <= budget.used(Explore.stage) / shares.explore

    def _next_finalist(self, out: Out) -> str | None:
        state = self.state
        recovering = [task.subject.key for task in out.values() if isinstance(task, Recover)]
        chosen = [key for (key, fidelity) in state.ledger.latest if fidelity == "recovered"]
        chosen += [key for key in recovering if key not in chosen]
        if len(chosen) >= state.spec.most_finalists:
            return None
        again = next((key for key in chosen if key not in recovering and state.ledger.is_open(key, "recovered")), None)
        confirmed = [state.estimates.confirmed_vector(e) for e in state.ledger.complete("confirmed")]
        return again or next_finalist(state.estimates.explored(), chosen, confirmed, state.estimates.perceived)


def timing_is_free(out: Out) -> bool:
    """Whether no task in flight uses the target for timing."""
    return not any(task.is_timed for task in out.values())


def _count(out: Out, kind: type[Task]) -> int:
    return sum(isinstance(task, kind) for task in out.values())


def _end(reason: str) -> Decision:
    return Decision("done", reason=reason)


def _end_or_wait(reason: str, out: Out) -> Decision:
    """The end, once nothing is in flight that could make more due."""
    return Decision("wait") if out else _end(reason)
