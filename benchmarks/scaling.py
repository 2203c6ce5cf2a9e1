"""How exploring grows with workers: the real driver (policy, store, Optuna) on the simulated evaluator's virtual clock.

What the driver needs between tasks is measured and charged to that clock, so a driver that is too slow for its workers shows.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, figure

WORKERS = (1, 4, 16, 64, 100)
SEEDS = 5
DECISIONS = 600
# For `driver_ms_per_task`.
MANY = 2000


@dataclass(frozen=True)
class Run:
    """Explored candidates and the simulated seconds that exploring took, the volume that they dominate, and the driver's real
    milliseconds per task."""

    explored: int
    seconds: float
    volume: float
    driver_ms: float

    @property
    def rate(self) -> float:
        """Rung-0 decisions per simulated second."""
        return self.explored / self.seconds


def scaling_simulated() -> Iterator[Figure]:
    """Rung-0 decisions per simulated second at 16 workers over 16 times those at one; median of the seeds."""
    runs = {n: [simulated_run(n, seed, DECISIONS) for seed in range(SEEDS)] for n in WORKERS}
    alone = runs[1]
    efficiency = {n: [run.rate / (n * one.rate) for run, one in zip(runs[n], alone, strict=True)] for n in WORKERS}
    volumes = {n: [run.volume / one.volume for run, one in zip(runs[n], alone, strict=True)] for n in WORKERS}
    yield figure(
        "scaling_simulated",
        statistics.median(efficiency[16]),
        "of linear, 16 workers",
        min(efficiency[16]),
        max(efficiency[16]),
        by_workers={str(n): round(statistics.median(found), 3) for n, found in efficiency.items()},
        volume_ratio={str(n): round(statistics.median(found), 4) for n, found in volumes.items()},
        decisions=DECISIONS,
        seeds=SEEDS,
    )
    many = simulated_run(16, 0, MANY)
    yield figure("driver_ms_per_task", many.driver_ms, "ms", tasks=MANY, workers=16)


def simulated_run(workers: int, seed: int, decisions: int) -> Run:
    """Explore `decisions` candidates, with one finalist and all else as in a search."""
    from paretune.hardware_profiles.profile import detected_profile
    from paretune.search.budget import Budget
    from paretune.search.estimation.state import SearchState
    from paretune.search.evaluators.simulated import SECONDS, SHAPE, SimulatedEvaluator, VirtualClock
    from paretune.search.execution.inline import run_workers
    from paretune.search.hypervolume import in_teacher_units, volume
    from paretune.search.policy.director import Director
    from paretune.search.spec import Spec
    from paretune.search.study.store import Store
    from paretune.search.tasks.base import Outcome, Task
    from paretune.spaces.space import Space

    profile, clock = detected_profile(), VirtualClock()
    spec = Spec.model_validate(
        {"budget": "300d", "fit_points": 30, "max_candidates": decisions, "finalists": 1, "seed": seed}
    )
    space = Space.of(SHAPE, profile.weight_formats)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(
            Path(folder) / "studies" / "s",
            {"state": "running", "spec": spec.model_dump(mode="json"), "profile": profile.model_dump(mode="json")},
        )
        setup = {"spec": spec.model_dump(mode="json"), "profile": profile.model_dump(mode="json")}
        (store.folder / "setup.json").write_text(json.dumps(setup), encoding="utf-8")
        evaluator = SimulatedEvaluator(store.folder, Path(folder))
        director = Director(SearchState(store, spec, space, Budget(spec.budget_s, clock=clock), workers=workers))
        moments: list[float] = []
        evaluating = 0.0

        def evaluate(task: Task) -> Outcome[Any]:
            nonlocal evaluating
            began = time.perf_counter()
            outcome = evaluator.run(task)
            evaluating += time.perf_counter() - began
            if task.kind == "rung0":
                moments.append(clock.now)
            return outcome

        began = time.perf_counter()
        run_workers(
            director, evaluate, clock, lambda task: SECONDS[task.kind], lambda: time.perf_counter() - evaluating
        )
        driven = time.perf_counter() - began - evaluating
        estimates, ledger = director.state.estimates, director.state.ledger
        vectors = [v for key in director.explored_keys() if (v := estimates.vector(key)) is not None]
        teacher = estimates.confirmed_vector(ledger.latest[director.state.teacher_key, "confirmed"])
        units = [in_teacher_units(v, teacher, spec.objectives) for v in vectors]
        tasks = len(ledger.latest)
        store.close()
    return Run(
        len(moments),
        moments[-1] - moments[0] + SECONDS["rung0"],
        volume(units, spec.reference, spec.objectives),
        1e3 * driven / tasks,
    )
