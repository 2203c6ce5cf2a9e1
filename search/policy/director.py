"""Decides what is due, writes what came of it into the store. No Ray, no Optuna, no torch in here.

Everything it knows it reads from the store, so resuming is asking again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from paretune.objectives.profiler.findings import profiled_candidates
from paretune.objectives.profiler.places import Findings
from paretune.search.budget import Budget
from paretune.search.policy.estimates import Estimates
from paretune.search.policy.initial_candidates import textbook_candidates
from paretune.search.policy.ledger import MAX_ATTEMPTS, Ledger
from paretune.search.policy.planning import Decision, Planning
from paretune.search.spec import Spec
from paretune.search.students import student_seeds
from paretune.search.study.control import REASON, Verb, ordered
from paretune.search.study.database import folder_gone
from paretune.search.study.records import Fidelity, now
from paretune.search.study.store import Store
from paretune.search.task import Outcome, Task
from paretune.spaces.kinds import AnyCandidate, AnySpace
from paretune.spaces.mixed import Sensitivity
from paretune.spaces.space import Space

MOST_FAILURES_IN_A_ROW = 8
STAGE = {
    "fit": "latency fit",
    "elastic": "elastic student",
    "sensitivity": "sensitivity",
    "rung0": "explore",
    "recover": "recover and confirm",
    "confirm": "recover and confirm",
}
ENDING = "ending"  # nothing is handed out any more
SLICED = ("fit", "elastic")
FIDELITY: dict[str, Fidelity] = {"rung0": "rung0", "recover": "recovered", "confirm": "confirmed"}


class Director:
    """The search's policy over one study. One piece of work is out at a time."""

    def __init__(
        self,
        store: Store,
        spec: Spec,
        space: AnySpace,
        budget: Budget,
        notify: Callable[[str, dict[str, Any]], None] = lambda _kind, _data: None,
    ) -> None:
        self.store, self.spec, self.space, self.budget, self.notify = store, spec, space, budget, notify
        self.out: Task | None = None
        self.stop_reason: str | None = None
        self.exit_code = 0
        self.remedy = ""
        self.is_interrupted = False
        self.obeyed: Verb | None = None
        self._failures: list[Outcome] = []
        self._lost_tables = 0
        self._told_stage = ""
        self.ledger = Ledger(store)
        self.estimates = Estimates(store, spec, space, self.ledger)
        self.planning = Planning(store, spec, space, budget, self.ledger, self.estimates)
        self._open_mixed()
        first = space.baselines()[0].key
        if (first, "confirmed") in self.ledger.latest:
            self._require_teacher(first, self.ledger.latest[first, "confirmed"].reason)

    # what is due

    def next(self) -> Decision:
        """The next thing to do; work that is handed out must come back before there is more."""
        self._require_folder()
        if self.out is not None:
            return Decision("wait")
        self.apply_command()
        if self.stop_reason is not None:
            last = self.planning.unconfirmed() if self.obeyed == "stop" and not self.is_interrupted else None
            return self._hand_out(last or Decision("done", reason=self.stop_reason))
        decision = self.planning.due()
        if decision.kind == "done":
            self.stop_reason = decision.reason
        return self._hand_out(decision)

    def register(self, candidate: AnyCandidate, source: str, params: dict[str, Any], **meta: Any) -> Task | None:
        """Take a proposal: rung-0 work, or None if the store already has this candidate."""
        if not self.ledger.add(candidate, source, params, **meta):
            return None
        return self._hand_out(self.planning.task("rung0", candidate)).task

    def seeds(self) -> list[AnyCandidate]:
        """The user's, the profile's and textbook candidates that are not explored yet; they come before the sampler's."""
        own: list[AnyCandidate] = []
        if isinstance(self.space, Space):
            own += student_seeds(self.space, self.spec.student_configs)
        profiled = profiled_candidates(self.space, self._findings())
        found = (*own, *profiled, *textbook_candidates(self.space))
        return [c for c in dict.fromkeys(found) if c.key not in self.ledger.rows]

    def _findings(self) -> Findings | None:
        """What `paretune profile` had found when the study was made: what is found later changes nothing in it."""
        known = self.store.meta("findings")
        return None if known is None else Findings.from_dict(known)

    def explored_keys(self) -> list[str]:
        """Keys with a complete rung-0 evaluation in the order of their proposal."""
        return self.ledger.explored_keys()

    def exhausted(self) -> None:
        """The sampler found nothing new any more."""
        self.store.set_meta(exhausted=True)
        self.store.event("exhausted", "the sampler proposed only known candidates; exploring ends")

    def _hand_out(self, decision: Decision) -> Decision:
        task = decision.task
        if task is not None and task.candidate is not None:
            self.store.start(task.candidate.key, FIDELITY[task.kind])
        self.out = task
        self._tell_stage(decision)
        return decision

    # what came of it

    def progressed(self, task: Task, outcome: Outcome, seconds: float) -> None:
        """A report on the way (fit, elastic)."""
        self._charge(task, seconds)
        if task.kind == "elastic":
            self.store.set_meta(elastic={**outcome.facts, "done": False})
        self.notify("progress", {"kind": task.kind, **{k: v for k, v in outcome.facts.items() if k != "kept"}})

    def completed(self, task: Task, outcome: Outcome, seconds: float) -> None:
        """The end of a piece of work, however it ended."""
        self.out = None
        self._require_folder()
        self._charge(task, seconds)
        if outcome.status == "fatal":
            self._give_up(outcome.reason, outcome.exit_code, outcome.facts.get("remedy", ""))
        if task.kind == "fit":
            self._fit_came_back(outcome)
        elif task.kind == "elastic":
            self._elastic_came_back(outcome)
        elif task.kind == "sensitivity":
            self._sensitivity_came_back(outcome)
        else:
            assert task.candidate is not None
            self._evaluation_came_back(task, task.candidate, outcome, seconds)
        self._watch_failures(outcome)

    def lost(self, task: Task, reason: str, seconds: float) -> None:
        """The worker died or hung; the work becomes due again until it has failed MAX_ATTEMPTS times."""
        self.out = None
        self._require_folder()
        self._charge(task, seconds)
        if self.is_interrupted:  # the user stopped it: not an attempt
            self.store.withdraw()
            return
        self.store.event("lost", f"{task.kind} lost: {reason}")
        if task.candidate is not None:
            fidelity = FIDELITY[task.kind]
            attempts = self.ledger.latest.get((task.candidate.key, fidelity))
            final = attempts is not None and attempts.attempt + 1 >= MAX_ATTEMPTS
            self.store.finish(
                task.candidate.key, fidelity, "failed" if final else "lost", reason=reason, seconds=seconds
            )
            self.ledger.refresh(task.candidate.key, fidelity)
            self._require_teacher(task.candidate.key, reason)
        if task.kind == "sensitivity":
            self._lost_tables += 1
            if self._lost_tables >= MAX_ATTEMPTS:
                self._sensitivity_came_back(Outcome("failed", reason=reason))
        self._watch_failures(Outcome("failed", reason=reason))
        self.notify("lost", {"kind": task.kind, "reason": reason})

    def interrupt(self) -> None:
        """End in good order: nothing new is handed out."""
        self.is_interrupted = True
        self.stop_reason, self.exit_code = "interrupted", 130

    def apply_command(self) -> None:
        """Follow what was ordered through the study's folder. Work in slices is left where it is: it goes on from there."""
        verb = ordered(self.store.folder)
        if verb is None or verb == self.obeyed or self.obeyed == "cancel" or self.is_interrupted:
            return
        self.obeyed, self.stop_reason = verb, REASON[verb]
        self.exit_code = 0 if verb == "stop" else 130
        self.store.event("order", REASON[verb])
        self.is_interrupted = verb == "cancel" or (self.out is not None and self.out.kind in SLICED)

    def _fit_came_back(self, outcome: Outcome) -> None:
        if outcome.status != "complete":
            self._give_up(f"the latency fit could not be measured: {outcome.reason}", 1)
            return
        self.store.set_meta(fit_done=True, fit_points=outcome.facts["kept"])
        if refused := outcome.facts.get("refused"):
            self.store.event("fit", f"the engine refused {len(refused)} of the fit's candidates: {refused[0]}")
        self.estimates.refit()
        if not self.estimates.fits:
            self._give_up("the machine was too busy to measure anything for the latency fit", 5)
        if outcome.facts.get("disturbed"):
            self.store.event(
                "fit",
                f"{outcome.facts['disturbed']} of the fit's measurements were disturbed by other work; predictions are rough",
            )
        for name, fit in self.estimates.fits.items():
            self.store.event(
                "fit",
                f"latency fit of {name}: held-out error {fit.error.median:.1%} median, {fit.error.worst:.1%} worst, Kendall tau "
                f"{fit.error.kendall_tau:.2f} (parameters x bits: {fit.error.params_bits_tau:.2f}) over {fit.error.points} measurements",
            )
        self.notify("fit", {name: fit.error.__dict__ for name, fit in self.estimates.fits.items()})

    def _elastic_came_back(self, outcome: Outcome) -> None:
        if outcome.status != "complete":
            if self.budget.left_s > 1:
                self._give_up(f"the elastic student could not be trained: {outcome.reason}", 1)
            return
        self.store.set_meta(elastic={**outcome.facts, "done": True})
        elapsed, tokens = outcome.facts["elapsed_s"], outcome.facts["tokens"]
        if not self.space.has_elastic:
            self.store.event("elastic", f"training speed {tokens / max(elapsed, 1e-9):,.0f} examples/s")
        elif outcome.facts["kept"]:
            self.store.event("elastic", "elastic student taken from an earlier search")
        else:
            self.store.event("elastic", f"elastic student trained for {elapsed:.0f} s on {tokens:,.0f} tokens")
        self.notify("elastic", {"done": True, **outcome.facts})

    def _sensitivity_came_back(self, outcome: Outcome) -> None:
        """The table opens the mixed part of the space; without it the search goes on with uniform precision."""
        if outcome.status == "complete":
            self.store.set_meta(sensitivity=outcome.facts)
            group, form, loss = Sensitivity.from_dict(outcome.facts["table"]).worst()
            told = "taken from an earlier search" if outcome.facts["kept"] else "measured"
            self.store.event(
                "sensitivity", f"sensitivity table {told}; {group} in {form.label} loses most, {loss:.3g} nats"
            )
        elif outcome.status != "fatal":
            self.store.set_meta(sensitivity={"table": None, "reason": outcome.reason})
            self.store.event("sensitivity", f"no mixed precision is searched: {outcome.reason}")
        self._open_mixed()
        facts = {k: v for k, v in outcome.facts.items() if k != "table"}
        self.notify("sensitivity", {"reason": outcome.reason, **facts})

    def _open_mixed(self) -> None:
        known, space = self.store.meta("sensitivity"), self.space
        if known is not None and isinstance(space, Space) and space.has_mixed:
            table = None if known["table"] is None else Sensitivity.from_dict(known["table"])
            self.space = self.planning.space = self.estimates.space = replace(
                space, mixed=table is not None, sensitivity=table
            )
            self.estimates.version += 1

    def _evaluation_came_back(self, task: Task, candidate: AnyCandidate, outcome: Outcome, seconds: float) -> None:
        fidelity = FIDELITY[task.kind]
        measurements = dict(outcome.measurements)
        if fidelity == "rung0" and outcome.status == "complete":
            measurements = self.estimates.completed(candidate, measurements)
        status: Any = "lost" if outcome.status == "fatal" else outcome.status
        artifact = (
            None if outcome.artifact is None else (self.store.folder / "artifacts" / candidate.key, outcome.artifact[1])
        )
        self.store.finish(
            candidate.key,
            fidelity,
            status,
            measurements=measurements,
            scores=outcome.scores,
            facts=outcome.facts,
            reason=outcome.reason,
            seconds=seconds,
            publish=fidelity == "confirmed" and status == "complete",
            artifact=artifact,
        )
        self.ledger.refresh(candidate.key, fidelity)
        self._require_teacher(candidate.key, outcome.reason)
        if outcome.facts.get("idle_masks"):
            self.store.event("nothing changed", f"the pattern drops no weight: {candidate.describe()}")
        if fidelity == "confirmed" and status == "complete":
            self.estimates.learn(candidate, measurements)
        elif fidelity == "rung0" and status == "complete":
            self.estimates.write([candidate.key])
        self.notify(fidelity, {"key": candidate.key, "status": status, "reason": outcome.reason})

    def _require_teacher(self, key: str, reason: str) -> None:
        """Nothing can be judged without the fp32 teacher: if it cannot be confirmed, the search ends."""
        if key == self.space.baselines()[0].key and self.stop_reason is None:
            e = self.ledger.latest[key, "confirmed"]
            if e.status in ("failed", "infeasible"):
                self._give_up(f"the teacher itself could not be confirmed: {reason}", 4)

    def _watch_failures(self, outcome: Outcome) -> None:
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
            self._give_up(f"{number} evaluations failed in a row, the last one with: {last}", 4)

    def _require_folder(self) -> None:
        """Without the study folder nothing can be kept. Raises EnvironmentProblem."""
        if not self.store.is_there:
            raise folder_gone(self.store.folder)

    def _give_up(self, reason: str, exit_code: int, remedy: str = "") -> None:
        self.stop_reason, self.exit_code, self.remedy = reason, exit_code, remedy
        self.store.event("stopped", f"{reason}; {remedy}" if remedy else reason)

    def _tell_stage(self, decision: Decision) -> None:
        """Write what is done now where readers see it, when it changes."""
        if decision.kind == "wait":
            return
        idle = STAGE["rung0"] if decision.kind == "propose" else ENDING
        stage = idle if decision.task is None else self._stage_of(decision.task)
        if stage != self._told_stage:
            self._told_stage = stage
            self.store.set_meta(stage=stage)

    def _stage_of(self, task: Task) -> str:
        confirmed = task.candidate if task.kind == "confirm" else None
        if confirmed is not None and self.ledger.rows[confirmed.key].source == "baseline":
            return "baselines"
        if task.kind == "elastic" and not self.space.has_elastic:
            return "training speed"
        return STAGE[task.kind]

    def _charge(self, task: Task, seconds: float) -> None:
        stage = self._stage_of(task)
        self.budget.charge(stage, seconds)
        spent = self.budget.elapsed_s
        self.store.set_meta(spent_s=spent, spent_at=[spent, now()], seconds_by_stage=self.budget.stages)
