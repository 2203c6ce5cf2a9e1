"""Decides what is due and writes what came of it into the store. No Ray, no Optuna, no torch in here.

Everything it knows it reads from the store, so resuming is asking again.
"""

from __future__ import annotations

from typing import Any

from paretune.objectives.profiler.findings import profiled_candidates
from paretune.objectives.profiler.places import Findings
from paretune.search.estimation.state import SearchState
from paretune.search.policy.initial_candidates import textbook_candidates
from paretune.search.policy.planning import Decision, Planning, timing_is_free
from paretune.search.students import student_seeds
from paretune.search.study.control import REASON, Verb, ordered
from paretune.search.study.database import folder_gone
from paretune.search.study.records import now
from paretune.search.tasks.base import Outcome, Task
from paretune.search.tasks.explore import Explore
from paretune.spaces.kinds import AnyCandidate
from paretune.spaces.space import Space

MOST_FAILURES_IN_A_ROW = 8
INTERRUPTED = 130
ENDING = "ending"  # nothing is handed out any more


class Director:
    """The search's policy over one study. At most `workers` tasks are in flight, which `out` holds by their names."""

    def __init__(self, state: SearchState) -> None:
        self.state = state
        self.planning = Planning(self.state)
        self.out: dict[str, Task] = {}
        self.is_interrupted = False
        self.obeyed: Verb | None = None
        self._failures: list[Outcome[Any]] = []
        self._untold: dict[str, Any] = {}
        self._told_stage = ""
        teacher = self.state.ledger.latest.get((self.state.teacher_key, "confirmed"))
        if teacher is not None:
            self.state.require_teacher(teacher.key, teacher.reason)

    # what is due

    def next(self) -> Decision:
        """The next thing to do. "wait" while every worker has a task, or while nothing more can begin before one has ended."""
        self._require_folder()
        if len(self.out) >= self.state.workers:
            return self._hand_out(Decision("wait"))
        self.apply_command()
        if self.state.stop_reason is not None:
            return self._hand_out(self._last_decision())
        decision = self.planning.due(self.out)
        if decision.kind == "done":
            self.state.stop_reason = decision.reason
        return self._hand_out(decision)

    def _last_decision(self) -> Decision:
        """After an order to stop, what is recovered is still confirmed."""
        state = self.state
        if self.obeyed == "stop" and not self.is_interrupted:
            last = self.planning.unconfirmed(self.out)
            if last is not None:
                return last if last.kind == "done" or timing_is_free(self.out) else Decision("wait")
            if self.out and state.budget.left_s > 0:
                return Decision("wait")
        return Decision("done", reason=state.stop_reason or "")

    def register(self, candidate: AnyCandidate, source: str, params: dict[str, Any], **meta: Any) -> Task | None:
        """Take a proposal: the task to explore it, or None if the study already has this candidate."""
        if not self.state.ledger.add(candidate, source, params, **meta):
            return None
        return self._hand_out(Decision("work", Explore.of(self.state, candidate))).task

    def seeds(self) -> list[AnyCandidate]:
        """The user's, the profile's and textbook candidates that are not explored yet; they come before the sampler's."""
        own: list[AnyCandidate] = []
        space = self.state.space
        if isinstance(space, Space):
            own += student_seeds(space, self.state.spec.student_configs)
        profiled = profiled_candidates(space, self._findings())
        found = (*own, *profiled, *textbook_candidates(space))
        return [c for c in dict.fromkeys(found) if c.key not in self.state.ledger.rows]

    def _findings(self) -> Findings | None:
        """What `paretune op-profile` had found when the study was made: what is found later changes nothing in it."""
        known = self.state.store.meta("findings")
        return None if known is None else Findings.from_dict(known)

    def explored_keys(self) -> list[str]:
        """Keys with a complete rung-0 evaluation in the order of their proposal."""
        return self.state.ledger.explored_keys()

    def exhausted(self) -> None:
        """The sampler found nothing new any more."""
        self.state.store.set_meta(exhausted=True)
        self.state.store.event("exhausted", "the sampler proposed only known candidates; exploring ends")

    def _hand_out(self, decision: Decision) -> Decision:
        task = decision.task
        if task is not None:
            task.started(self.state)
            self.out[task.name] = task
        self._tell_stage(decision)
        return decision

    # what came of it

    def progressed(self, task: Task, outcome: Outcome[Any], seconds: float) -> None:
        """A report on the way."""
        self._charge(task, seconds)
        task.progressed(self.state, outcome)

    def completed(self, task: Task, outcome: Outcome[Any], seconds: float) -> None:
        """The end of a task, however it ended."""
        self.out.pop(task.name, None)
        self._require_folder()
        self._charge(task, seconds)
        if outcome.status == "fatal":
            self.state.give_up(outcome.reason, outcome.exit_code, outcome.remedy)
        task.completed(self.state, outcome, seconds)
        self._watch_failures(outcome)

    def lost(self, task: Task, reason: str, seconds: float) -> None:
        """The worker died or hung; the task becomes due again until it has failed MAX_ATTEMPTS times."""
        self.out.pop(task.name, None)
        self._require_folder()
        self._charge(task, seconds)
        if self.is_interrupted:  # the user stopped it: not an attempt
            self.state.store.withdraw()
            return
        self.state.store.event("lost", f"{task.kind} lost: {reason}")
        task.lost(self.state, reason, seconds)
        self._watch_failures(Outcome("failed", reason=reason))
        self.state.notify("lost", {"kind": task.kind, "reason": reason})

    def interrupt(self) -> None:
        """End in good order: nothing new is handed out."""
        self.is_interrupted = True
        self.state.stop_reason, self.state.exit_code = "interrupted", INTERRUPTED

    def apply_command(self) -> None:
        """Follow what was ordered through the study's folder. Work in slices is left where it is: it goes on from there."""
        verb = ordered(self.state.store.folder)
        if verb is None or verb == self.obeyed or self.obeyed == "cancel" or self.is_interrupted:
            return
        if self.state.exit_code not in (0, INTERRUPTED):  # it has failed, and ends for that reason
            self.is_interrupted = verb == "cancel"
            return
        self.obeyed, self.state.stop_reason = verb, REASON[verb]
        self.state.exit_code = 0 if verb == "stop" else INTERRUPTED
        self.state.store.event("order", REASON[verb])
        self.is_interrupted = verb == "cancel" or any(task.is_sliced for task in self.out.values())

    def _watch_failures(self, outcome: Outcome[Any]) -> None:
        """End a search in which nothing works. A candidate that cannot be built or run says nothing about the next one, unless
        all of them say the same."""
        if outcome.status == "complete":
            self._failures = []
            return
        self._failures.append(outcome)
        failed = [o for o in self._failures if o.status != "infeasible"]
        alike = not failed and len({o.reason for o in self._failures}) == 1
        number = len(self._failures) if alike else len(failed)
        if number >= MOST_FAILURES_IN_A_ROW:
            last = (failed or self._failures)[-1].reason
            self.state.give_up(f"{number} evaluations failed in a row, the last one with: {last}", 4)

    def _require_folder(self) -> None:
        """Without the study folder nothing can be kept. Raises EnvironmentProblem."""
        if not self.state.store.is_there:
            raise folder_gone(self.state.store.folder)

    def _tell_stage(self, decision: Decision) -> None:
        """Write time used, stage and tasks in flight where readers see them, in one transaction, if they have changed."""
        told = self._untold
        if decision.kind != "wait":
            idle = Explore.stage if decision.kind == "propose" else ENDING
            stage = idle if decision.task is None else decision.task.stage_in(self.state)
            if stage != self._told_stage:
                self._told_stage = told["stage"] = stage
        if self.state.workers > 1 and (told or decision.task is not None):
            told["doing"] = self._doing()
        if told:
            self.state.store.set_meta(**told)
            self._untold = {}

    def _doing(self) -> list[dict[str, str]]:
        """Stage and candidate of every task in flight."""
        return [
            {"stage": task.stage_in(self.state), "candidate": "" if task.subject is None else task.subject.describe()}
            for task in self.out.values()
        ]

    def _charge(self, task: Task, seconds: float) -> None:
        budget = self.state.budget
        budget.charge(task.stage_in(self.state), seconds)
        spent = budget.elapsed_s
        self._untold = {"spent_s": spent, "spent_at": [spent, now()], "seconds_by_stage": budget.stages}
