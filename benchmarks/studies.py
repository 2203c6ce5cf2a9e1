"""Figures that are read from the latest complete study of the embedded teacher (`make demo` makes one)."""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Iterator

import numpy as np

from benchmarks.common import Figure, figure, latest_study
from paretune.search.study.store import Store
from paretune.search.study.view import StudyView
from paretune.spaces import Candidate


def candidates_per_minute() -> Iterator[Figure]:
    """Rung-0 candidates per minute of wall time between consecutive sampler proposals of the study."""
    view = latest_study()
    seconds = rung0_gaps(view)
    rate = 60 / statistics.mean(seconds)
    tokens = sum(next(p for p in view.rung0).scores.targets) if view.rung0 else 0  # type: ignore[union-attr]
    yield figure(
        "candidates_per_minute",
        rate,
        "1/min",
        60 / np.quantile(seconds, 0.9),
        60 / np.quantile(seconds, 0.1),
        tokens=tokens,
        samples=len(seconds),
        sampler=view.meta["spec"]["sampler"],
    )


def rung0_gaps(view: StudyView) -> list[float]:
    """Seconds from the end of one rung-0 evaluation to the end of the next, where no other work lay between."""
    store = Store.reader(view.folder)
    ends = sorted((datetime.datetime.fromisoformat(e.at).timestamp(), e.fidelity) for e in store.evaluations())
    store.close()
    return [b - a for (a, kind_a), (b, kind_b) in itertools.pairwise(ends) if kind_a == kind_b == "rung0"]


def demo_seconds() -> Iterator[Figure]:
    """The search of `make demo`: seconds, distinct candidates, front members that are no ties."""
    view = latest_study()
    points = len(view.front) - len(view.ties)
    yield figure(
        "demo_seconds",
        view.meta["spent_s"],
        "s",
        distinct_candidates=len(view.rung0) + len(view.baselines),
        confirmed=len(view.confirmed),
        front=points,
        launches=view.meta["launches"],
        elastic_kept=bool(view.meta["elastic"]["kept"]),
    )


def decode_ratio_at_loss() -> Iterator[Figure]:
    """Best confirmed decode latency over the fp32 teacher's, at most 1, 3 and 10 % higher NLL on the report split."""
    view = latest_study()
    teacher = view.teacher
    assert teacher is not None
    base = teacher.measurements["decode_ms_per_token"].value
    for limit in (0.01, 0.03, 0.10):
        inside = [
            p
            for p in view.confirmed
            if p.measurements["relative_loss"].value <= limit
            and p.measurements["decode_ms_per_token"].provenance == "measured"
        ]
        best = min(inside, key=lambda p: p.measurements["decode_ms_per_token"].value)
        m = best.measurements["decode_ms_per_token"]
        yield figure(
            f"decode_ratio_at_loss_{limit:.0%}".replace("%", "pct"),
            m.value / base,
            "ratio",
            m.low / base,
            m.high / base,
            candidate=best.name,
            loss=best.measurements["relative_loss"].value,
            compressed_bytes=best.measurements["compressed_bytes"].value,
        )


def elastic_rank_agreement() -> Iterator[Figure]:
    """Kendall tau between leave-one-out calibrated rung-0 estimates and confirmed NLL, beside that of the parameter count."""
    from scipy.stats import kendalltau

    from paretune.objectives.prediction.latency_fit import features
    from paretune.search.estimation.calibration import Calibration, Pair
    from paretune.teachers.checkpoint.teacher import load_teacher

    view = latest_study()
    store = Store.reader(view.folder)
    rung0 = {e.key: e for e in store.evaluations("rung0", "complete")}
    teacher = next(
        e for e in store.evaluations("confirmed", "complete") if view.teacher is not None and e.key == view.teacher.key
    )
    shape = load_teacher("stdlib-coder").shape
    assert teacher.scores is not None
    pairs, candidates = [], []
    for p in view.confirmed:
        if p.key in rung0:
            early = rung0[p.key].scores
            assert early is not None and p.scores is not None and isinstance(p.candidate, Candidate)
            pairs.append(
                Pair(
                    p.candidate,
                    early.mean_nll - teacher.facts["search_nll"],
                    p.scores.mean_nll - teacher.scores.mean_nll,
                )
            )
            candidates.append(p.candidate)
    store.close()
    held_out = [
        Calibration(shape, pairs[:i] + pairs[i + 1 :]).estimate(p.candidate, p.rung0) for i, p in enumerate(pairs)
    ]
    raw, confirmed = [p.rung0 for p in pairs], [p.confirmed for p in pairs]
    parameters = [-float(features(c, shape)[2:-1].sum()) for c in candidates]
    generator = np.random.default_rng(0)
    taus = []
    for _ in range(1000):
        pick = generator.integers(0, len(pairs), len(pairs))
        taus.append(kendalltau(np.array(held_out)[pick], np.array(confirmed)[pick]).statistic)
    low, high = np.nanquantile(taus, [0.025, 0.975])
    special = sum(
        c.is_sparse or any(f.bits == 4 for f in (c.layers[0].ffn_format, c.layers[0].attention_format))
        for c in candidates
    )
    yield figure(
        "elastic_rank_agreement",
        kendalltau(held_out, confirmed).statistic,
        "Kendall tau",
        float(low),
        float(high),
        candidates=len(pairs),
        sparse_or_int4=special,
        raw_rung0_tau=kendalltau(raw, confirmed).statistic,
        parameter_count_tau=kendalltau(parameters, confirmed).statistic,
    )


def latency_fit_error() -> Iterator[Figure]:
    """Held-out relative error of the latency fit, and its rank agreement beside parameters x bits."""
    for name, error in latest_study().meta["fit_error"].items():
        yield figure(
            f"latency_fit_error_{name}",
            error["median"],
            "fraction",
            None,
            None,
            worst=error["worst"],
            kendall_tau=error["kendall_tau"],
            params_bits_tau=error["params_bits_tau"],
            points=error["points"],
        )
