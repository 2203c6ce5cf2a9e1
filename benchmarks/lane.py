"""What the measuring lane costs, and whether its numbers hold: structures timed to ±2 %, a front measured again, a busy neighbour.

Both figures need a machine on which nothing else runs; what they find of load is in their own counts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import HOME, Figure, figure, latest_study
from paretune.compression.export.graph import build_model, save_model
from paretune.compression.prune.structure import Importance, slice_weights
from paretune.hardware_profiles import MachineLock, load_profile
from paretune.objectives.artifacts.remeasure import CLOSE, Remeasured, remeasure
from paretune.objectives.latency.benchmark import LatencyBenchmark, LatencyResult
from paretune.objectives.latency.reference import open_local_benchmark
from paretune.objectives.measurement import Measurement
from paretune.objectives.prediction.latency_fit import design
from paretune.spaces.candidate import Candidate
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import EMBEDDED, load_teacher

STRUCTURES, WITHIN = 12, 0.02
MOST_SECONDS = 1800
NEIGHBOUR = f"import time\nend = time.monotonic() + {MOST_SECONDS}\nwhile time.monotonic() < end: pass"
MEMBERS_BESIDE_A_NEIGHBOUR = 6
Again = Callable[[Path], Remeasured]


def measure_seconds() -> Iterator[Figure]:
    """Wall seconds per structure until decode and TTFT are known to ±2 % (95 %), child processes and their loads included.

    The machine's nominal is learnt before, once for all structures, as in a search; building the graphs is not measured.
    """
    profile = load_profile("local-cpu", HOME)
    benchmark = open_local_benchmark(HOME / "cache", profile, MachineLock())
    with tempfile.TemporaryDirectory() as folder:
        models = write_structures(Path(folder), STRUCTURES, profile.weight_formats)
        benchmark.latencies(models[0])
        yield seconds_figure(timed(benchmark, models))


def write_structures(folder: Path, count: int, kernels: Sequence[str]) -> list[Path]:
    """Graphs of designed candidates of the embedded teacher."""
    designed = design(Space.of(load_teacher(EMBEDDED).shape, tuple(kernels)), count)
    return write_models(folder, [c for c in designed if isinstance(c, Candidate)])


def write_models(folder: Path, candidates: Sequence[Candidate]) -> list[Path]:
    """Graphs of candidates of the embedded teacher, widths cut but not sorted: values do not change the time."""
    teacher = load_teacher(EMBEDDED)
    weights, shape = teacher.weights(), teacher.shape
    order = Importance((), (), tuple(range(shape.layers)))
    models = []
    for i, candidate in enumerate(candidates):
        models.append(folder / f"{i}.onnx")
        sliced = slice_weights(weights, candidate, order, shape)
        save_model(build_model(sliced, candidate, teacher.config, shape), models[-1])
    return models


def timed(benchmark: LatencyBenchmark, models: Sequence[Path]) -> list[tuple[float, LatencyResult]]:
    """Seconds of each structure with what the lane found."""
    found = []
    for model in models:
        start = time.perf_counter()
        result = benchmark.latencies(model, WITHIN)
        found.append((time.perf_counter() - start, result))
    return found


def seconds_figure(found: Sequence[tuple[float, LatencyResult]]) -> Figure:
    """The median over all structures, those that did not reach the interval included: their time was spent too."""
    seconds = [s for s, _ in found]
    results = [r for _, r in found]
    return figure(
        "measure_seconds",
        statistics.median(seconds),
        "s per structure",
        min(seconds),
        max(seconds),
        structures=len(found),
        within=WITHIN,
        reached=sum(r.stable for r in results),
        median_half_width=statistics.median(r.half_width for r in results),
        median_visits=statistics.median(r.visits for r in results),
        disturbed_visits=sum(r.flagged for r in results),
    )


@dataclass(frozen=True)
class Member:
    """A front member's latencies: what its study said, and what was found later (None: refused, not measured)."""

    key: str
    then: dict[str, Measurement]
    now: dict[str, Measurement] | None


@dataclass(frozen=True)
class Beside:
    """Counts of measurements beside a neighbour. `kept` were called measured all the same; of those `wrong` differ from their
    study by 3 % or more outside the interval of the difference."""

    attempts: int
    flagged: int
    refused: int
    kept: int
    wrong: int


def remeasure_error() -> Iterator[Figure]:
    """Members of the latest study's front measured again: how many are within 3 %, and how many pairs have changed places.

    Then some of them beside a busy neighbour: free to run anywhere, and on the lane's own core.
    """
    view = latest_study()
    profile = str(view.meta["profile"]["name"])
    paths = {p.key: view.folder / "artifacts" / p.key for p in view.front}

    def again(artifact: Path) -> Remeasured:
        return remeasure(artifact, profile, HOME, WITHIN)

    yield error_figure([member(key, again(path)) for key, path in paths.items()], view.study)
    some = list(paths.values())[:MEMBERS_BESIDE_A_NEIGHBOUR]
    for where, cpu in (("anywhere", None), ("on the lane's core", max(os.sched_getaffinity(0)))):
        with neighbour(cpu):
            yield beside_figure(beside([again(path) for path in some]), where)


def member(key: str, found: Remeasured) -> Member:
    """What was said of a member and what was found; only latencies that its study measured in peace."""
    then = {a.name: a.then for a in found.agreements if a.then is not None and a.then.provenance == "measured"}
    now = {a.name: a.now for a in found.agreements if a.name in then} if found.benchmark.stable else None
    return Member(key, then, now)


def error_figure(members: Sequence[Member], study: str) -> Figure:
    """Share of latencies within 3 % of their study's, of those that were measured; refused ones are counted beside."""
    errors = [abs(now.value / m.then[name].value - 1) for m in members if m.now for name, now in m.now.items()]
    pairs, swapped = inversions(members)
    return figure(
        "remeasure_error",
        sum(e <= CLOSE for e in errors) / len(errors) if errors else 0.0,
        "fraction within 3 %",
        latencies=len(errors),
        members=len(members),
        refused=sum(m.now is None for m in members),
        median_error=statistics.median(errors) if errors else None,
        worst_error=max(errors, default=None),
        separate_pairs=pairs,
        inversions=swapped,
        study=study,
    )


def inversions(members: Sequence[Member]) -> tuple[int, int]:
    """Pairs whose intervals do not overlap, neither then nor now, and how many of them have changed places."""
    pairs = swapped = 0
    for a, b in itertools.combinations([m for m in members if m.now], 2):
        assert a.now is not None and b.now is not None
        for name in a.now.keys() & b.now.keys():
            then, now = (a.then[name], b.then[name]), (a.now[name], b.now[name])
            if not then[0].overlaps(then[1]) and not now[0].overlaps(now[1]):
                pairs += 1
                swapped += (then[0].value < then[1].value) != (now[0].value < now[1].value)
    return pairs, swapped


@contextlib.contextmanager
def neighbour(cpu: int | None) -> Iterator[None]:
    """A busy process, on one CPU if it is named; it ends with the block, or by itself."""
    process = subprocess.Popen([sys.executable, "-S", "-c", NEIGHBOUR])
    try:
        if cpu is not None:
            os.sched_setaffinity(process.pid, {cpu})
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def beside(found: Sequence[Remeasured]) -> Beside:
    """What became of measurements that something disturbed."""
    kept = [f for f in found if f.benchmark.stable]
    return Beside(
        len(found),
        sum(f.benchmark.flagged > 0 for f in found),
        len(found) - len(kept),
        len(kept),
        sum(any(a.agrees is False for a in f.agreements) for f in kept),
    )


def beside_figure(counts: Beside, where: str) -> Figure:
    """How many were refused; none of those called measured may be wrong."""
    return figure(
        "remeasure_beside_neighbour", counts.refused, f"of {counts.attempts} refused", where=where, **vars(counts)
    )
