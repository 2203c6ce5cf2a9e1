"""The searcher that Ray Tune asks: the director says what is due, and only for rung-0 proposals Optuna is asked.

A subclass of Ray's OptunaSearch, with what that lacks: duplicates are answered from the store, a missing or failed value is
told as FAIL (never left RUNNING), constraints are set, the study is rebuilt when calibration or latency fit change, and a
trial that is not a proposal (baseline, fit, elastic student, recovery, confirmation) never reaches Optuna.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import Trial, TrialState
from ray.tune import Stopper
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from paretune.search.budget import GRACE_S
from paretune.search.policy.director import Director
from paretune.search.samplers.optuna_sampler import (
    distributions,
    frozen_trial,
    holding,
    make_sampler,
    params_in,
    rebuild,
    stable_seed,
    tell_constraints,
)
from paretune.search.samplers.sequential import SequentialPlan
from paretune.search.tasks.base import Task
from paretune.search.tasks.explore import Explore
from paretune.spaces.candidate import Candidate, Shape
from paretune.spaces.kinds import AnyCandidate, params_of
from paretune.spaces.space import Distribution

MOST_DUPLICATES = 40
# So often the sampler is asked for one proposal; then its last one is changed, one more parameter after so many repetitions.
MOST_ASKS, REPEATS_PER_PARAMETER = 2, 8
TASK, OUTCOME = "task", "outcome"
LOOK_EVERY_S = 0.5
# Parameters of a decoder's size.
SIZES = ("depth", "ffn", "kv_groups", "hidden")


@dataclass
class Flight:
    """A task in flight, when it began or last reported, and its trial in Optuna's study if it was proposed there."""

    task: Task
    since: float
    trial: Trial | None = None


class JointSearch(OptunaSearch):  # type: ignore[misc, unused-ignore]
    """Hands out the director's tasks as Tune configs {"task": Task} and takes results {"outcome": Outcome}.

    Proposals in flight are RUNNING trials of Optuna's study, also after it was rebuilt, so that TPE keeps away from them
    (`constant_liar`).
    """

    def __init__(self, director: Director) -> None:
        state = director.state
        self._distributions = distributions(state.space)
        objectives = list(state.spec.objectives)
        super().__init__(
            space=self._distributions,
            metric=objectives,
            mode=["min"] * len(objectives),
            sampler=make_sampler(state.spec.sampler, state.spec.seed, self._distributions),
        )
        self.director, self.state, self.estimates = director, state, state.estimates
        self._built = -1
        self._asked = int(state.store.meta("asked", 0))
        self._flights: dict[str, Flight] = {}
        self._plan: SequentialPlan | None = None
        self._seeds: list[AnyCandidate] | None = None
        self._is_whole_explored = False  # nothing new of the teacher's size is found any more

    def suggest(self, trial_id: str) -> Any:
        """The next Tune config, None if something must finish first, FINISHED at the end."""
        decision = self.director.next()
        if decision.kind == "wait":
            return None
        task = self._propose(trial_id, decision.full_size) if decision.kind == "propose" else decision.task
        if task is None:
            return Searcher.FINISHED if self.state.stop_reason is not None else None
        flight = self._flights.setdefault(trial_id, Flight(task, 0.0))
        flight.since = self.state.budget.clock()
        return {TASK: task}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass a report of unfinished work on to the director; finished work comes to `on_trial_complete`."""
        outcome = result[OUTCOME]
        if outcome.done or trial_id not in self._flights:
            return
        flight = self._flights[trial_id]
        now = self.state.budget.clock()
        seconds, flight.since = now - flight.since, now
        self.director.progressed(flight.task, outcome, seconds)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Give the outcome to the director, or report the task as lost; tell Optuna the value of a proposal."""
        flight = self._flights.pop(trial_id, None)
        if flight is None:
            return
        outcome = result[OUTCOME] if result and OUTCOME in result and not error else None
        seconds = self.state.budget.clock() - flight.since
        if outcome is None or not outcome.done:
            self.director.lost(flight.task, "the worker died or was stopped (see the study's log)", seconds)
        else:
            self.director.completed(flight.task, outcome, seconds)
        if isinstance(flight.task, Explore):
            self._tell(flight.trial, flight.task.candidate.key)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Tune pickles its settings at the start; nothing of a search lives there."""
        return str, ("rebuilt from the store",)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store is the truth."""
        Path(checkpoint_path).write_text("{}", encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Raises RuntimeError: a search is resumed from its store."""
        raise RuntimeError(f"{checkpoint_path}: a search is resumed from its store, never from Tune's files")

    def _propose(self, trial_id: str, full_size: bool) -> Task | None:
        if self._seeds is None:  # not before the sensitivity table is known
            sequential = self.state.spec.sampler == "sequential"
            self._plan = SequentialPlan(self.estimates) if sequential else None
            self._seeds = [] if sequential else self.director.seeds()
        if self._plan is not None:
            return None if full_size or self._is_exploring() else self._planned(self._plan)
        while (candidate := self._next_seed(full_size)) is not None:
            task = self.director.register(candidate, "seed", params_of(self.state.space, candidate))
            if task is not None:
                return task
        if full_size and self._is_whole_explored:
            return None
        fixed = self._full_size_params() if full_size else {}
        params: dict[str, Any] = {}
        for attempt in range(MOST_DUPLICATES):
            trial = self._ask(fixed) if attempt < MOST_ASKS else self._ask_near(params, fixed, attempt)
            params = trial.params
            candidate = self.state.space.decode(trial.params)
            task = self.director.register(candidate, "sampler", trial.params, asked=self._asked)
            if task is not None:
                self._flights[trial_id] = Flight(task, 0.0, trial)
                return task
            # Not told a second time: a study that is rebuilt after a resume has one trial per row of the store.
            self._ot_study.tell(trial, state=TrialState.FAIL)
        self._is_whole_explored = full_size
        return None if full_size else self._random_proposal()

    def _is_exploring(self) -> bool:
        """Whether a proposal is in flight: stages that follow each other must know what came of it."""
        return any(isinstance(flight.task, Explore) for flight in self._flights.values())

    def _next_seed(self, full_size: bool) -> AnyCandidate | None:
        """Take the next candidate that comes before the sampler's; of the teacher's size if no other can be explored yet."""
        assert self._seeds is not None
        shape = self.state.space.shape
        for i, candidate in enumerate(self._seeds):
            whole = isinstance(candidate, Candidate) and isinstance(shape, Shape) and candidate.is_full_size(shape)
            if whole or not full_size:
                return self._seeds.pop(i)
        return None

    def _full_size_params(self) -> dict[str, Any]:
        """What the sampler has to leave alone so that a candidate has the teacher's size."""
        space = self.state.space
        whole = params_of(space, self.estimates.baselines[0])
        return {name: whole[name] for name in SIZES if name in whole}

    def _planned(self, plan: SequentialPlan) -> Task | None:
        """The next candidate of a search that goes by stages; without one exploring ends."""
        params = plan.ask()
        if params is not None:
            return self.director.register(self.state.space.decode(params), "sampler", params)
        self.director.exhausted()
        return self.director.next().task

    def _random_proposal(self) -> Task | None:
        """When the sampler only repeats itself: uniformly random candidates, and after many duplicates the end of exploring."""
        generator = random.Random(stable_seed(self.state.spec.seed, -self._asked))
        for _ in range(10 * MOST_DUPLICATES):
            known = self.state.space.distributions()
            params = {name: _draw(generator, distribution) for name, distribution in known.items()}
            task = self.director.register(self.state.space.decode(params), "sampler", params)
            if task is not None:
                return task
        self.director.exhausted()
        return self.director.next().task

    def _ask(self, fixed: dict[str, Any]) -> Trial:
        """A trial of Optuna's study with a proposal. Its seed is that of the number of this ask and of what is in flight, so with
        one worker an interrupted search proposes what the uninterrupted one would have proposed."""
        name = self.state.spec.sampler
        in_flight = sorted(f.task.candidate.key for f in self._flights.values() if isinstance(f.task, Explore))
        if self._built >= 0 and name == "nsga2":
            self._built = self.estimates.version  # its generations live in the study: rebuilt at a launch only
        if self._built != self.estimates.version:
            self._rebuild()
        seed = stable_seed(self.state.spec.seed, self._asked, in_flight)
        self._ot_study.sampler = holding(fixed, make_sampler(name, seed, self._distributions))
        self._asked += 1
        return self._ot_study.ask(self._distributions)

    def _ask_near(self, params: dict[str, Any], fixed: dict[str, Any], attempt: int) -> Trial:
        """A trial beside one that is known: the more attempts, the more of its parameters are drawn anew, uniformly.

        The sampler would repeat itself many times, and each ask takes it longer the more trials there are.
        """
        self._asked += 1
        generator = random.Random(stable_seed(self.state.spec.seed, self._asked, ["near"]))
        free = [name for name in sorted(self._distributions) if name not in fixed]
        drawn = set(generator.sample(free, min(len(free), 1 + attempt // REPEATS_PER_PARAMETER)))
        known = self.state.space.distributions()
        self._ot_study.enqueue_trial(
            {name: _draw(generator, known[name]) if name in drawn else params[name] for name in self._distributions}
        )
        return self._ot_study.ask(self._distributions)

    def _rebuild(self) -> None:
        """Everything explored so far with the present estimates, and what is in flight."""
        self._distributions = self._space = distributions(self.state.space)  # mixed precision opens later
        sampler = make_sampler(self.state.spec.sampler, self.state.spec.seed, self._distributions)
        self._ot_study, self._built = rebuild(self.estimates, sampler, self._distributions), self.estimates.version
        for flight in self._flights.values():
            if isinstance(flight.task, Explore):
                params = params_in(self.estimates, flight.task.candidate.key, self._distributions)
                self._ot_study.enqueue_trial(params)
                flight.trial = self._ot_study.ask(self._distributions)

    def _tell(self, trial: Trial | None, key: str) -> None:
        """Tell Optuna what the store knows of the candidate that a trial proposed."""
        if self._built != self.estimates.version and self.state.spec.sampler != "nsga2":
            return  # the study will be rebuilt with this value before the next ask
        vector = self.estimates.vector(key)
        if trial is None:
            self._ot_study.add_trial(frozen_trial(self.estimates, key, self._distributions))
        elif vector is None or not all(math.isfinite(v) for v in vector):
            self._ot_study.tell(trial, state=TrialState.FAIL)
        else:
            tell_constraints(trial, self.estimates.constraints(key))
            self._ot_study.tell(trial, [float(v) for v in vector])


def _draw(generator: random.Random, distribution: Distribution) -> Any:
    """A value of a parameter, each as likely as the others."""
    kind, bounds = distribution
    return generator.randint(*bounds) if kind == "int" else generator.choice(bounds)


class Interrupt(Stopper):  # type: ignore[misc, unused-ignore]
    """Ends Tune when a signal or an order through the study's folder asked for it, or when a worker that should have ended
    itself is stuck past the budget."""

    def __init__(self, director: Director) -> None:
        self.director, self._looked = director, -math.inf

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Apply what the study's folder orders. True once the search is interrupted or GRACE_S over its budget."""
        budget = self.director.state.budget
        if budget.elapsed_s - self._looked > LOOK_EVERY_S:
            self._looked = budget.elapsed_s
            self.director.apply_command()
        return self.director.is_interrupted or budget.elapsed_s > budget.total_s + GRACE_S

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("rebuilt from the store",)
