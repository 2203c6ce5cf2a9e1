"""Benchmarks: `make bench` or `make bench NAME=decode_ratio_at_loss`. One JSON line per figure, appended to results.jsonl.

Figures are ratios inside one run where the machine's noise matters. Those of `studies` read the latest complete study of
`mlruns` (run `make demo` first); the others measure by themselves. Nothing else should run meanwhile: the line says what did.
The benchmarks of `LONG` take from three minutes to an hour and run only by name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os

from benchmarks import (
    cores,
    faults,
    joint,
    lane,
    memory,
    overhead,
    prediction,
    scaling,
    service,
    speed,
    studies,
    table,
    targets,
)
from benchmarks.common import RESULTS, Benchmark, Figure
from benchmarks.reports import reports
from paretune import __version__
from paretune.hardware_profiles import detect_local, fingerprint, package_version

QUICK: tuple[Benchmark, ...] = (
    studies.candidates_per_minute,
    overhead.trial_overhead_ms,
    studies.demo_seconds,
    studies.decode_ratio_at_loss,
    studies.elastic_rank_agreement,
    studies.latency_fit_error,
    memory.memory_mb,
    lane.measure_seconds,
    prediction.predict_error_local,
    overhead.recommend_ms,
    targets.second_target_cost,
    service.recommend_in_process_ms,
    service.page_seconds,
    service.submissions,
    speed.quantize_seconds_per_100m_params,
    speed.prune_seconds_per_100m_params,
    speed.weights_fill_ms,
)
LONG: tuple[Benchmark, ...] = (
    service.get_p95_ms,
    service.search_slowdown,
    service.first_result_seconds,
    faults.service_under_faults,
    scaling.scaling_simulated,
    cores.cores,
    lane.remeasure_error,
    table.method_table,
    joint.joint_vs_sequential,
    memory.peak_rss_gb_135m,
    reports,
)
BENCHMARKS: dict[str, Benchmark] = {f.__name__: f for f in (*QUICK, *LONG)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench NAME=", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(BENCHMARKS))
    names = parser.parse_args().names or [f.__name__ for f in QUICK]
    unknown = [n for n in names if n not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    known = context()
    for name in names:
        for found in BENCHMARKS[name]():
            line = json.dumps({**found, **known, "command": f"make bench NAME={name}"})
            print(line, flush=True)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


def context() -> Figure:
    """What every line says of machine, versions and load."""
    machine = detect_local()
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB",
        "fingerprint": fingerprint(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "paretune": __version__,
            **{n: package_version(n) for n in ("torch", "onnxruntime", "ray", "optuna", "mlflow")},
        },
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
