"""What the machinery around the evaluations costs: time per trial, time of a recommendation."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, figure, search_command
from benchmarks.studies import rung0_gaps
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.evaluation import EvaluationTask
from paretune.search.tasks.explore import Explore


def trial_overhead_ms() -> Iterator[Figure]:
    """Wall time per rung-0 trial of the same search with evaluations that cost nothing: Ray, Optuna, store, policy."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spec.yaml").write_text(
            "budget: 5m\nfit_points: 30\nmax_candidates: 150\nfinalists: 1\n", encoding="utf-8"
        )
        environment = {
            **os.environ,
            "PARETUNE_EVALUATOR": "paretune.search.evaluators.simulated:SimulatedEvaluator",
            "PARETUNE_HOME": f"{folder}/home",
        }
        subprocess.run(
            search_command("spec.yaml"), cwd=folder, env=environment, check=True, capture_output=True, timeout=280
        )
        store = Store.reader(next(Path(folder, "home", "studies").iterdir()))
        view = load_view(store)
        store.close()
        gaps = [1e3 * g for g in rung0_gaps(view)]
    yield figure(
        "trial_overhead_ms",
        statistics.mean(gaps),
        "ms",
        float(np.quantile(gaps, 0.1)),
        float(np.quantile(gaps, 0.9)),
        samples=len(gaps),
    )


def recommend_ms() -> Iterator[Figure]:
    """`paretune recommend` as a whole process on a study of 1,000 explored candidates."""
    from paretune.hardware_profiles.profile import detected_profile
    from paretune.search.evaluators.simulated import SHAPE, SimulatedEvaluator
    from paretune.spaces.space import Space

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        profile = detected_profile()
        spec: Figure = {"objectives": ["nll", "decode_ms_per_token", "compressed_bytes"]}
        store = Store.create(
            home / "studies" / "bench", {"state": "complete", "spec": spec, "spent_s": 1.0, "budget_s": 1.0}
        )
        (store.folder / "setup.json").write_text(
            json.dumps({"spec": {}, "profile": profile.model_dump(mode="json")}), encoding="utf-8"
        )
        evaluator, space = SimulatedEvaluator(store.folder, home), Space.of(SHAPE, profile.weight_formats)
        fill(store, space, evaluator)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "paretune", "recommend", "--home", str(home), "--max-loss", "5%"],
                check=True,
                capture_output=True,
            )
            times.append(1e3 * (time.perf_counter() - start))
        store.close()
    yield figure("recommend_ms", statistics.median(times[1:]), "ms", min(times[1:]), max(times[1:]), candidates=1000)


def fill(store: Store, space: Any, evaluator: Any) -> None:
    """1,000 explored and 40 confirmed candidates."""
    from paretune.objectives.measurement import Measurement

    generator = random.Random(0)
    for candidate in space.baselines():
        store.add_candidate(candidate, "baseline", {})
    while len(store.candidates()) < 1000:
        params = {
            n: generator.randint(*b) if k == "int" else generator.choice(b)
            for n, (k, b) in space.distributions().items()
        }
        store.add_candidate(space.decode(params), "sampler", params)
    kinds: tuple[type[EvaluationTask[Any]], ...] = (Explore, Confirm)
    for row in store.candidates():
        for kind in kinds:
            if kind is Explore or row.number < 40:
                found = evaluator.run(kind(row.candidate)).found
                store.start(row.key, kind.fidelity)
                extra = {"estimated_nll": Measurement.exact(2.0, "nats/token")} if kind is Explore else {}
                store.finish(
                    row.key,
                    kind.fidelity,
                    "complete",
                    measurements={**found.measurements, **extra},
                    scores=found.scores,
                )
