"""How well a study's latency fit predicts structures that it has not seen, from the whole space, measured now by the lane."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common import HOME, Figure, figure, latest_study
from benchmarks.lane import write_models
from paretune.hardware_profiles import MachineLock, Profile
from paretune.objectives.latency.benchmark import LATENCIES, LatencyResult
from paretune.objectives.latency.reference import open_local_benchmark
from paretune.objectives.prediction.latency_fit import LatencyFit, proxy
from paretune.search.study.store import Store
from paretune.spaces.candidate import Candidate, Shape
from paretune.spaces.kinds import candidate_from_dict
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import EMBEDDED, load_teacher

HELD_OUT = 40
UNITS = {"decode_ms_per_token": "ms/token", "ttft_ms": "ms"}


@dataclass(frozen=True)
class Seen:
    """A held-out candidate with what the lane found."""

    candidate: Candidate
    benchmark: LatencyResult


def predict_error_local() -> Iterator[Figure]:
    """Relative error of the latest study's fit over held-out structures, every other with layers that differ in width,
    KV groups and precision; and its rank agreement beside that of parameters x bits. The measurement's own half-width
    stands beside: no error can be smaller than that."""
    view = latest_study()
    profile = Profile.model_validate(view.meta["profile"])
    shape = load_teacher(EMBEDDED).shape
    store = Store.reader(view.folder)
    points = [(candidate_from_dict(p["candidate"]), p) for p in store.meta("fit_points")]
    store.close()
    known = {candidate.key for candidate, _ in points} | {p.key for p in view.confirmed}
    candidates = held_out(Space.of(shape, profile.weight_formats), HELD_OUT, known)
    benchmark = open_local_benchmark(HOME / "cache", profile, MachineLock())
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder), candidates)
        seen = [Seen(c, benchmark.latencies(m)) for c, m in zip(candidates, models, strict=True)]
    for name, unit in UNITS.items():
        fit = LatencyFit(name, unit, shape, [(c, p[name]) for c, p in points])
        yield error_figure(fit, shape, [s for s in seen if s.benchmark.stable], len(seen))


def held_out(space: Space, count: int, known: set[str], seed: int = 1) -> list[Candidate]:
    """`count` random dense candidates of the space that are not `known`; every other takes each layer from one of two."""
    source, found = random.Random(seed), dict[str, Candidate]()
    while len(found) < count:
        one, other = _drawn(space, source), _drawn(space, source)
        layers = tuple(source.choice((layer, source.choice(other.layers))) for layer in one.layers)
        mixed = replace(one, layers=layers).canonical(space.shape)
        candidate = mixed if len(found) % 2 else one
        if candidate.key not in known:
            found[candidate.key] = candidate
    return list(found.values())


def _drawn(space: Space, source: random.Random) -> Candidate:
    params = {
        name: source.randint(*bounds) if kind == "int" else source.choice(bounds)
        for name, (kind, bounds) in space.distributions().items()
    }
    return space.decode(params | {"pattern": "none", "quantizer": "rtn", "precision_mode": "uniform"})


def error_figure(fit: LatencyFit, shape: Shape, seen: Sequence[Seen], drawn: int) -> Figure:
    """Median, worst and 95th percentile of |predicted / measured - 1|."""
    from scipy.stats import kendalltau

    assert fit.name in LATENCIES
    measured = [s.benchmark.measurements[fit.name].value for s in seen]
    predicted = [fit.predict(s.candidate).value for s in seen]
    errors = sorted(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))
    worst = max(zip(predicted, measured, seen, strict=True), key=lambda row: abs(row[0] / row[1] - 1))[2]
    return figure(
        f"predict_error_local_{fit.name}",
        statistics.median(errors),
        "fraction",
        worst=errors[-1],
        p95=errors[int(0.95 * (len(errors) - 1))],
        worst_candidate=worst.candidate.describe(),
        kendall_tau=float(kendalltau(predicted, measured).statistic),
        params_bits_tau=float(kendalltau([proxy(s.candidate, shape) for s in seen], measured).statistic),
        median_half_width=statistics.median(s.benchmark.half_width for s in seen),
        held_out=len(seen),
        drawn=drawn,
        fit_points=fit.error.points,
    )
