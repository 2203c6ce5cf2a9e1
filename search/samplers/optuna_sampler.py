"""Optuna's part: a study in memory, rebuilt from the store, with a sampler seeded anew for every ask.

The seed of ask n is a hash of (search seed, n, candidates in flight), so with one worker an interrupted search proposes what
the uninterrupted one would have proposed; nothing of Optuna's own state needs to survive.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, NSGAIISampler, PartialFixedSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from paretune.search.estimation.estimates import Estimates
from paretune.spaces.kinds import AnySpace

RANDOM_STARTS = 12
POPULATION = 24
# What studies of version 0.1, whose parameters lack it, did.
SINCE_THEN = {"quantizer": "rtn", "hidden": 0, "precision_mode": "uniform", "effective_bits": 0}


def stable_seed(seed: int, number: int, in_flight: Sequence[str] = ()) -> int:
    """32-bit hash of the seed, the number of an ask and the keys in flight, the same in every process."""
    text = ":".join([str(seed), str(number), *in_flight])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def distributions(space: AnySpace) -> dict[str, BaseDistribution]:
    """The space's variables as Optuna distributions; ordered choices are integers."""
    return {
        name: IntDistribution(*bounds) if kind == "int" else CategoricalDistribution(bounds)
        for name, (kind, bounds) in space.distributions().items()
    }


class SpaceTPESampler(TPESampler):  # type: ignore[misc, unused-ignore]
    """TPE over a space that all trials share, so that it need not be found in them again for every ask."""

    def __init__(self, space: Mapping[str, BaseDistribution], **options: Any) -> None:
        super().__init__(**options)
        self._space = {name: space[name] for name in sorted(space) if not space[name].single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The space without parameters that have one value only."""
        return self._space


def make_sampler(name: str, seed: int, space: Mapping[str, BaseDistribution]) -> BaseSampler:
    """TPE (multivariate, Bergstra et al. 2011; multi-objective after Ozaki et al. 2022) or NSGA-II (Deb et al. 2002)."""
    if name == "nsga2":
        return NSGAIISampler(population_size=POPULATION, seed=seed)
    return SpaceTPESampler(space, seed=seed, multivariate=True, n_startup_trials=RANDOM_STARTS, constant_liar=True)


def holding(fixed: Mapping[str, Any], sampler: BaseSampler) -> BaseSampler:
    """The sampler, leaving these parameters as they are."""
    if not fixed:
        return sampler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return PartialFixedSampler(dict(fixed), sampler)


def params_in(estimates: Estimates, key: str, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """What was proposed for a candidate, with a value for every parameter of the space as it is now."""
    return {name: estimates.params(key).get(name, SINCE_THEN.get(name)) for name in space}


def frozen_trial(estimates: Estimates, key: str, space: Mapping[str, BaseDistribution]) -> FrozenTrial:
    """A candidate of the store as a finished trial: COMPLETE with float objectives, or FAIL without values."""
    vector, params = estimates.vector(key), params_in(estimates, key, space)
    if vector is None:
        return create_trial(state=TrialState.FAIL, params=params, distributions=dict(space))
    return create_trial(
        state=TrialState.COMPLETE,
        params=params,
        distributions=dict(space),
        values=[float(v) for v in vector],
        constraints=estimates.constraints(key),
    )


def rebuild(estimates: Estimates, sampler: BaseSampler, space: Mapping[str, BaseDistribution]) -> optuna.Study:
    """A fresh study over everything explored so far, with the current estimates."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["minimize"] * len(estimates.spec.objectives), sampler=sampler)
    study.add_trials([frozen_trial(estimates, key, space) for key in estimates.ledger.explored_keys()])
    return study


def tell_constraints(trial: Any, constraints: Mapping[str, float]) -> None:
    """All constraints in the same order on a running trial, as Optuna's samplers want them."""
    for name, value in constraints.items():
        trial.set_constraint(name, value)
