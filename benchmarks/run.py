"""Benchmarks: `make bench` or `make bench NAME=decode_ratio_at_loss`. One JSON line per figure, appended to results.jsonl.

Figures are ratios inside one run where the machine's noise matters. Those of the search read the latest complete study of
`mlruns` (run `make demo` first); the others measure by themselves. Nothing else should run meanwhile: the line says what did.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paretune import __version__
from paretune.hardware_profiles import detect_local, fingerprint, package_version
from paretune.search.store import Store
from paretune.search.view import StudyView, load_view

RESULTS = Path(__file__).resolve().parent / "results.jsonl"
HOME = Path(os.environ.get("PARETUNE_HOME", "mlruns")).resolve()
Figure = dict[str, Any]


def latest_study() -> StudyView:
    """The newest complete study of the home."""
    for path in sorted((HOME / "studies").glob("*/study.db"), key=lambda p: p.stat().st_mtime, reverse=True):
        store = Store.reader(path.parent)
        if (
            store.meta("state") == "complete"
            and store.meta("teacher")["name"] == "stdlib-coder"
            and store.evaluations("recovered", "complete")
        ):
            view = load_view(store)
            store.close()
            return view
        store.close()
    sys.exit(f"no complete study in {HOME}: run `make demo` first")


def figure(
    name: str, value: float, unit: str, low: float | None = None, high: float | None = None, **more: Any
) -> Figure:
    return {"name": name, "value": value, "unit": unit, "spread": None if low is None else [low, high], **more}


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


def trial_overhead_ms() -> Iterator[Figure]:
    """Wall time per rung-0 trial of the same search with evaluations that cost nothing: Ray, Optuna, store, policy."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spec.yaml").write_text("budget: 5m\nfit_points: 30\nmax_candidates: 150\nfinalists: 1\n")
        environment = {
            **os.environ,
            "PARETUNE_EVALUATOR": "paretune.search.simulated:SimulatedEvaluator",
            "PARETUNE_HOME": f"{folder}/home",
        }
        subprocess.run(
            [sys.executable, "-m", "paretune", "search", "spec.yaml"],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
            timeout=280,
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

    from paretune.objectives.latency_fit import features
    from paretune.search.calibration import Calibration, Pair
    from paretune.teachers import load_teacher

    view = latest_study()
    store = Store.reader(view.folder)
    rung0 = {e.key: e for e in store.evaluations("rung0", "complete")}
    teacher = next(
        e for e in store.evaluations("confirmed", "complete") if view.teacher is not None and e.key == view.teacher.key
    )
    shape = load_teacher("stdlib-coder").shape
    assert teacher.scores is not None
    pairs = [
        Pair(
            p.candidate,
            rung0[p.key].scores.mean_nll - teacher.facts["search_nll"],
            p.scores.mean_nll - teacher.scores.mean_nll,
        )  # type: ignore[union-attr]
        for p in view.confirmed
        if p.key in rung0
    ]
    store.close()
    held_out = [
        Calibration(shape, pairs[:i] + pairs[i + 1 :]).estimate(p.candidate, p.rung0) for i, p in enumerate(pairs)
    ]
    raw, confirmed = [p.rung0 for p in pairs], [p.confirmed for p in pairs]
    parameters = [-float(features(p.candidate, shape)[2:-1].sum()) for p in pairs]
    generator = np.random.default_rng(0)
    taus = []
    for _ in range(1000):
        pick = generator.integers(0, len(pairs), len(pairs))
        taus.append(kendalltau(np.array(held_out)[pick], np.array(confirmed)[pick]).statistic)
    low, high = np.nanquantile(taus, [0.025, 0.975])
    special = sum(
        p.candidate.is_sparse
        or any(f.bits == 4 for f in (p.candidate.layers[0].ffn_format, p.candidate.layers[0].attention_format))
        for p in pairs
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


def memory_mb() -> Iterator[Figure]:
    """Peak resident memory of driver, worker and Ray's daemons during 75 s of a real search."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PARETUNE_HOME": str(HOME)}
        command = [
            sys.executable,
            "-m",
            "paretune",
            "search",
            "--budget",
            "100s",
            "--study",
            f"bench-memory-{os.getpid()}",
            "--seed",
            str(os.getpid()),
        ]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        peak = {"driver_rss_mb": 0.0, "worker_rss_mb": 0.0, "ray_rss_mb": 0.0}
        while process.poll() is None:
            for name, value in resident(process.pid).items():
                peak[name] = max(peak[name], value)
            time.sleep(1)
    for name, value in peak.items():
        yield figure(name, value, "MB")


def resident(driver: int) -> dict[str, float]:
    """Resident MB now: the driver, the biggest worker, all other Ray processes together (shared pages counted in each)."""
    from paretune.search.processes import descendants

    found = {"driver_rss_mb": rss(driver), "worker_rss_mb": 0.0, "ray_rss_mb": 0.0}
    for pid, _ in descendants(driver):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if "ray::ResourceTrainable" in name or "ray::StudyWorker" in name:
            found["worker_rss_mb"] = max(found["worker_rss_mb"], rss(pid))
        elif "ray" in name and "paretune.engines" not in name:
            found["ray_rss_mb"] += rss(pid)
    return found


def rss(pid: int) -> float:
    try:
        return next(
            int(line.split()[1]) / 1024
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith("VmRSS")
        )
    except (OSError, StopIteration):
        return 0.0


def recommend_ms() -> Iterator[Figure]:
    """`paretune recommend` as a whole process on a study of 1,000 explored candidates."""
    from paretune.hardware_profiles.profile import detected_profile
    from paretune.search.simulated import SHAPE, SimulatedEvaluator
    from paretune.search.work import Work
    from paretune.spaces.space import Space

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        profile = detected_profile()
        spec: Figure = {"objectives": ["nll", "decode_ms_per_token", "compressed_bytes"]}
        store = Store.create(
            home / "studies" / "bench", {"state": "complete", "spec": spec, "spent_s": 1.0, "budget_s": 1.0}
        )
        (store.folder / "setup.json").write_text(json.dumps({"spec": {}, "profile": profile.model_dump(mode="json")}))
        evaluator, space = SimulatedEvaluator(store.folder, home), Space.of(SHAPE, profile.weight_formats)
        fill(store, space, evaluator, Work)
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


def fill(store: Store, space: Any, evaluator: Any, work: Any) -> None:
    """1,000 explored and 40 confirmed candidates."""
    import random

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
    for row in store.candidates():
        for fidelity, kind in (("rung0", "rung0"), ("confirmed", "confirm")):
            if fidelity == "rung0" or row.number < 40:
                outcome = evaluator.run(work(kind, row.candidate))
                store.start(row.key, fidelity)  # type: ignore[arg-type]
                extra = {"estimated_nll": Measurement.exact(2.0, "nats/token")} if fidelity == "rung0" else {}
                store.finish(
                    row.key, fidelity, "complete", measurements={**outcome.measurements, **extra}, scores=outcome.scores
                )  # type: ignore[arg-type]


BENCHMARKS: dict[str, Callable[[], Iterator[Figure]]] = {
    f.__name__: f
    for f in (
        candidates_per_minute,
        trial_overhead_ms,
        demo_seconds,
        decode_ratio_at_loss,
        elastic_rank_agreement,
        latency_fit_error,
        memory_mb,
        recommend_ms,
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    machine = detect_local()
    context = {
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB",
        "fingerprint": fingerprint(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "paretune": __version__,
            **{n: package_version(n) for n in ("torch", "onnxruntime", "ray", "optuna", "mlflow")},
        },
        "load": os.getloadavg()[0],
    }
    for name in names:
        for found in BENCHMARKS[name]():
            line = json.dumps({**found, **context, "command": f"make bench NAME={name}"})
            print(line, flush=True)
            with RESULTS.open("a") as stream:
                stream.write(line + "\n")


if __name__ == "__main__":
    main()
