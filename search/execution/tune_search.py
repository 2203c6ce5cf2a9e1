"""The searcher that Ray Tune asks: the director says what is due, and only for rung-0 proposals Optuna is asked.

A subclass of Ray's OptunaSearch, with what that lacks: duplicates are answered from the store, a missing or failed value is
told as FAIL (never left RUNNING), constraints are set, the study is rebuilt when calibration or latency fit change, and a
trial that is not a proposal (baseline, fit, elastic student, recovery, confirmation) never reaches Optuna.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from ray.tune import Stopper
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from paretune.search.budget import GRACE_S
from paretune.search.policy.director import Director
from paretune.search.samplers.optuna_sampler import (
    distributions,
    frozen_trial,
    make_sampler,
    rebuild,
    stable_seed,
    tell_constraints,
)
from paretune.search.samplers.sequential import SequentialPlan
from paretune.search.task import Outcome, Task
from paretune.spaces.kinds import AnyCandidate, params_of

MOST_DUPLICATES = 40
OUTCOME = "outcome"
LOOK_EVERY_S = 0.5


class JointSearch(OptunaSearch):  # type: ignore[misc, unused-ignore]
    """Hands out the director's work as Tune configs {"work": JSON} and takes results {"outcome": JSON}."""

    def __init__(self, director: Director) -> None:
        self._distributions = distributions(director.space)
        objectives = list(director.spec.objectives)
        super().__init__(
            space=self._distributions,
            metric=objectives,
            mode=["min"] * len(objectives),
            sampler=make_sampler(director.spec.sampler, director.spec.seed),
        )
        self.director = director
        self.estimates = director.estimates
        self._built = -1
        self._asked = int(director.store.meta("asked", 0))
        self._work: dict[str, tuple[Task, float]] = {}
        self._plan: SequentialPlan | None = None
        self._seeds: list[AnyCandidate] | None = None

    def suggest(self, trial_id: str) -> Any:
        """The next Tune config, None if something must finish first, FINISHED at the end."""
        decision = self.director.next()
        if decision.kind == "wait":
            return None
        task = self._propose(trial_id) if decision.kind == "propose" else decision.task
        if task is None:
            return Searcher.FINISHED if self.director.stop_reason is not None else None
        self._work[trial_id] = (task, self.director.budget.clock())
        return {"work": task.to_json()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a report of unfinished work on to the director; finished work comes to `on_trial_complete`."""
        outcome = Outcome.from_json(result[OUTCOME])
        if outcome.done or trial_id not in self._work:
            return
        task, since = self._work[trial_id]
        now = self.director.budget.clock()
        self._work[trial_id] = (task, now)
        self.director.progressed(task, outcome, now - since)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Give the outcome to the director, or report the task as lost; tell Optuna the value of a rung-0 proposal."""
        if trial_id not in self._work:
            return
        task, since = self._work.pop(trial_id)
        outcome = Outcome.from_json(result[OUTCOME]) if result and OUTCOME in result and not error else None
        if outcome is None or not outcome.done:
            self.director.lost(
                task, "the worker died or was stopped (see the study's log)", self.director.budget.clock() - since
            )
        else:
            self.director.completed(task, outcome, self.director.budget.clock() - since)
        if task.kind == "rung0" and task.candidate is not None:
            self._tell(trial_id, task.candidate.key)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Tune pickles its settings at the start; nothing of a search lives there."""
        return str, ("rebuilt from the store",)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store is the truth."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Raises RuntimeError: a search is resumed from its store."""
        raise RuntimeError(f"{checkpoint_path}: a search is resumed from its store, never from Tune's files")

    def _propose(self, trial_id: str) -> Task | None:
        if self._seeds is None:  # not before the sensitivity table is known
            sequential = self.director.spec.sampler == "sequential"
            self._plan = SequentialPlan(self.director.estimates) if sequential else None
            self._seeds = [] if sequential else self.director.seeds()
        if self._plan is not None:
            return self._planned(self._plan)
        while self._seeds:
            candidate = self._seeds.pop(0)
            task = self.director.register(candidate, "seed", params_of(self.director.space, candidate))
            if task is not None:
                return task
        for _ in range(MOST_DUPLICATES):
            params = self._ask(trial_id)
            candidate = self.director.space.decode(params)
            task = self.director.register(candidate, "sampler", params, asked=self._asked)
            if task is not None:
                return task
            # Not told a second time: a study that is rebuilt after a resume has one trial per row of the store.
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=TrialState.FAIL)
        return self._random_proposal()

    def _planned(self, plan: SequentialPlan) -> Task | None:
        """The next candidate of a search that goes by stages; without one exploring ends."""
        params = plan.ask()
        if params is not None:
            return self.director.register(self.director.space.decode(params), "sampler", params)
        self.director.exhausted()
        return self.director.next().task

    def _random_proposal(self) -> Task | None:
        """When the sampler only repeats itself: uniformly random candidates, and after many duplicates the end of exploring."""
        generator = random.Random(stable_seed(self.director.spec.seed, -self._asked))
        for _ in range(10 * MOST_DUPLICATES):
            params = {
                name: generator.randint(*bounds) if kind == "int" else generator.choice(bounds)
                for name, (kind, bounds) in self.director.space.distributions().items()
            }
            task = self.director.register(self.director.space.decode(params), "sampler", params)
            if task is not None:
                return task
        self.director.exhausted()
        return self.director.next().task

    def _ask(self, trial_id: str) -> dict[str, Any]:
        sampler = make_sampler(self.director.spec.sampler, stable_seed(self.director.spec.seed, self._asked))
        if self._built >= 0 and self.director.spec.sampler == "nsga2":
            self._built = self.estimates.version  # its generations live in the study: rebuilt at a launch only
        if self._built != self.estimates.version:
            self._distributions = self._space = distributions(self.director.space)  # mixed precision opens later
            self._ot_study, self._built = rebuild(self.estimates, sampler, self._distributions), self.estimates.version
        self._ot_study.sampler = sampler
        self._asked += 1
        params: dict[str, Any] = super().suggest(trial_id)
        return params

    def _tell(self, trial_id: str, key: str) -> None:
        """Tell Optuna what the store knows of the candidate that a trial proposed."""
        trial = self._ot_trials.pop(trial_id, None)
        vector = self.estimates.vector(key)
        if self._built != self.estimates.version and self.director.spec.sampler != "nsga2":
            return  # the study will be rebuilt with this value before the next ask
        if trial is None:
            self._ot_study.add_trial(frozen_trial(self.estimates, key, self._distributions))
        elif vector is None or not all(math.isfinite(v) for v in vector):
            self._ot_study.tell(trial, state=TrialState.FAIL)
        else:
            tell_constraints(trial, self.estimates.constraints(key))
            self._ot_study.tell(trial, [float(v) for v in vector])


class Interrupt(Stopper):  # type: ignore[misc, unused-ignore]
    """Ends Tune when a signal or an order through the study's folder asked for it, or when a worker that should have ended
    itself is stuck past the budget."""

    def __init__(self, director: Director) -> None:
        self.director, self._looked = director, -math.inf

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Apply what the study's folder orders. True once the search is interrupted or GRACE_S over its budget."""
        budget = self.director.budget
        if budget.elapsed_s - self._looked > LOOK_EVERY_S:
            self._looked = budget.elapsed_s
            self.director.apply_command()
        return self.director.is_interrupted or budget.elapsed_s > budget.total_s + GRACE_S

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("rebuilt from the store",)
