"""Joint against sequential search: the volume of the confirmed front after the same wall time, per seed.

    PARETUNE_BENCH_BUDGET=6m PARETUNE_BENCH_SEEDS=3 make bench NAME=joint_vs_sequential

Per seed one elastic student is trained and one set of latencies measured beforehand; both arms start with a copy of that
cache, so its time counts for neither. Then each arm has the whole budget: the same baselines, evaluator, finalists' rule,
recovery and confirmations; only what is proposed differs (`sampler: tpe` or `sequential`). The arms of a seed take turns in
being first. Studies stay in <home>/joint_vs_sequential/<budget>/; complete ones are not run again, so an interrupted
benchmark goes on (delete the folder to begin anew). `docs/make_joint_pictures.py` draws from them.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import HOME, Figure, figure, search_command
from paretune.search.front import Vector
from paretune.search.hypervolume import in_teacher_units, volume
from paretune.search.spec import Reference, make_spec
from paretune.search.study.store import Store
from paretune.search.study.view import load_view

ARMS = {"joint": "tpe", "sequential": "sequential"}
Runner = Callable[[Path, Path, str], None]


@dataclass(frozen=True)
class Arm:
    """One finished search: its front in teacher units, and its volume after each confirmation (seconds since the start)."""

    name: str
    seed: int
    objectives: tuple[str, ...]
    reference: Reference
    front: tuple[Vector, ...]
    seconds: tuple[float, ...]
    volumes: tuple[float, ...]
    explored: int
    confirmed: int

    @property
    def volume(self) -> float:
        """Of the whole front at the end."""
        return self.volumes[-1]

    def flat_volume(self, objective: str) -> float:
        """Of the front seen in NLL and one other objective only."""
        names = ("nll", objective)
        columns = [self.objectives.index(name) for name in names]
        return volume([tuple(v[c] for c in columns) for v in self.front], self.reference, names)


def joint_vs_sequential() -> Iterator[Figure]:
    """Ratio of the two volumes: median over seeds, and the lowest and highest of them."""
    budget = os.environ.get("PARETUNE_BENCH_BUDGET", "6m")
    seeds = int(os.environ.get("PARETUNE_BENCH_SEEDS", "3"))
    folder = HOME / "joint_vs_sequential" / budget
    for seed in range(seeds):
        run_seed(folder, seed, {"budget": budget})
    yield summary(read_arms(folder)[: 2 * seeds], budget)


def run_seed(folder: Path, seed: int, options: dict[str, Any], run: Runner | None = None) -> None:
    """Both arms of one seed, from one prepared cache."""
    settings = {**options, "seed": seed}
    cache = folder / f"seed{seed}-prepared"
    order = list(ARMS) if seed % 2 == 0 else list(reversed(ARMS))
    missing = [name for name in order if not is_complete(folder / f"seed{seed}-{name}")]
    if missing:
        prepare_cache(cache, settings)
    for name in missing:
        home = folder / f"seed{seed}-{name}"
        shutil.rmtree(home, ignore_errors=True)  # half a search in the same time is no comparison
        home.mkdir(parents=True)
        shutil.copytree(cache / "cache", home / "cache")
        (home / "spec.yaml").write_text(json.dumps({**settings, "sampler": ARMS[name]}), encoding="utf-8")
        (run or run_search)(home / "spec.yaml", home, name)
        tidy(home, name)


def is_complete(home: Path) -> bool:
    for path in home.glob("studies/*/study.db"):
        store = Store.reader(path.parent)
        state = store.meta("state")
        store.close()
        return bool(state == "complete")
    return False


def prepare_cache(home: Path, settings: dict[str, Any]) -> None:
    """Text, elastic student and latencies, as the searches will ask for them; nothing that is there is made again."""
    from paretune.objectives.prediction.latency_fit import design
    from paretune.search.execution.trainable import make_evaluator
    from paretune.search.prepare.prepare import prepare
    from paretune.search.prepare.studies import create_study
    from paretune.search.tasks.elastic import Elastic
    from paretune.search.tasks.fit import Fit

    ready = prepare(make_spec(None, None, settings), home)
    shutil.rmtree(home / "studies", ignore_errors=True)
    store = create_study(ready, home, "prepared", "make bench")
    evaluator = make_evaluator(store.folder, home)
    points = tuple(design(ready.space, ready.spec.fit_points, ready.spec.seed))
    try:
        for task in (Fit(points, 600.0, seconds_left=3600.0), Elastic(seconds_left=24 * 3600.0)):
            while not (outcome := evaluator.run(task)).done:
                pass
            if outcome.status != "complete":
                raise RuntimeError(f"{task.kind} before the comparison: {outcome.reason}")
    finally:
        evaluator.close()
        store.close()
    (home / "cache").mkdir(exist_ok=True)


def run_search(spec: Path, home: Path, study: str) -> None:
    """The search as a user runs it. Exit code 3 (no student was confirmed in time) is a result, too."""
    with (home / "search.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(search_command(spec, "--home", home, "--study", study), stdout=log, stderr=log)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"the search ended with exit code {done.returncode}, see {log.name}")


def tidy(home: Path, study: str) -> None:
    """Keep what a comparison reads; six searches' artifacts and caches are many gigabytes."""
    for folder, kept in ((home, "studies"), (home / "studies" / study, "")):
        for path in folder.iterdir():
            if path.is_dir() and path.name != kept:
                shutil.rmtree(path)


def read_arms(folder: Path) -> list[Arm]:
    """All finished arms of a run, by seed."""
    found = []
    for home in sorted(folder.glob("seed*-*"), key=lambda p: (int(p.name[4:].split("-")[0]), p.name)):
        name = home.name.partition("-")[2]
        if name in ARMS and is_complete(home):
            found.append(read_arm(home / "studies" / name, name))
    return found


def read_arm(folder: Path, name: str) -> Arm:
    """An arm from its study. Latencies that were disturbed count for nothing, as on the front."""
    store = Store.reader(folder)
    view = load_view(store)
    begin = next(_seconds(e.at) for e in store.events() if e.kind == "launch")
    evaluations = store.evaluations("confirmed", "complete")
    store.close()
    assert view.teacher is not None
    reference = Reference.model_validate(view.meta["spec"]["reference"])
    base = view.teacher.vector(view.objectives)
    latest: dict[str, Vector] = {}
    seconds, volumes = [], []
    for e in sorted(evaluations, key=lambda e: _seconds(e.at)):
        if any(e.measurements[n].provenance == "disturbed" for n in view.objectives):
            continue
        values = tuple(e.measurements[n].value for n in view.objectives)
        latest[e.key] = in_teacher_units(values, base, view.objectives)
        seconds.append(_seconds(e.at) - begin)
        volumes.append(volume(latest.values(), reference, view.objectives))
    front = tuple(in_teacher_units(p.vector(view.objectives), base, view.objectives) for p in view.front)
    return Arm(
        name,
        int(view.meta["seed"]),
        view.objectives,
        reference,
        front,
        tuple(seconds),
        tuple(volumes),
        len(view.rung0),
        len(view.confirmed),
    )


def summary(arms: list[Arm], budget: str) -> Figure:
    """The figure of a run: per seed joint over sequential."""
    by_seed = {seed: {a.name: a for a in arms if a.seed == seed} for seed in sorted({a.seed for a in arms})}
    pairs = [(found["joint"], found["sequential"]) for found in by_seed.values() if len(found) == len(ARMS)]
    if not pairs:
        raise ValueError("no seed has both arms: run make bench NAME=joint_vs_sequential")
    ratios = [j.volume / s.volume for j, s in pairs]
    flat = [name for name in pairs[0][0].objectives if name != "nll"]
    return figure(
        "joint_vs_sequential",
        statistics.median(ratios),
        "ratio",
        min(ratios),
        max(ratios),
        # the range of n samples covers the median of what they are drawn from with this probability
        coverage=1 - 2.0 ** (1 - len(ratios)),
        seeds=len(ratios),
        budget=budget,
        joint_volumes=[j.volume for j, _ in pairs],
        sequential_volumes=[s.volume for _, s in pairs],
        explored=[[a.explored for a in pair] for pair in pairs],
        confirmed=[[a.confirmed for a in pair] for pair in pairs],
        **{f"ratio_{n}": statistics.median(j.flat_volume(n) / s.flat_volume(n) for j, s in pairs) for n in flat},
    )


def _seconds(at: str) -> float:
    return datetime.datetime.fromisoformat(at).timestamp()
