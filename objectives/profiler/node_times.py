"""A graph in an engine child: its latency, its memory, and what every node of it takes.

Latency and memory are taken without the engine's profile, which slows small ops; then a session of its own is profiled. One
process, not corrected for the machine's drift: `paretune measure` does that.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from paretune.common.errors import EnvironmentProblem
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.lock import MachineLock
from paretune.objectives.latency.workload import MOST_FOREIGN_CORES, busy_seconds, waited_seconds, with_siblings
from paretune.objectives.measurement import Measurement, Provenance
from paretune.objectives.profiler.op_costs import Node

ROUNDS, REPEATS = 10, 8
WAIT_S, TIMEOUT_S = 30.0, 1800.0
LEAST_FOR_INTERVAL = 6


@dataclass(frozen=True)
class NodeProfile:
    """What the engine said: nodes in the order of execution, phase by phase; `run_ms` of whole runs while it was profiled."""

    measurements: dict[str, Measurement]
    nodes: tuple[Node, ...]
    run_ms: dict[str, float]

    @property
    def slowdown(self) -> dict[str, float]:
        """How much longer the ops together took while they were profiled than a whole run did without, by phase; at least 1."""
        plain = {"prefill": "ttft_ms", "decode": "decode_ms_per_token"}
        ops = {phase: sum(node.ms for node in self.nodes if node.phase == phase) for phase in plain}
        return {phase: max(1.0, ops[phase] / self.measurements[name].value) for phase, name in plain.items()}


def profile_graph(model: Path, threads: int, prompt: int, tokens: int, lock: MachineLock | None = None) -> NodeProfile:
    """Prefills of `prompt` tokens with `tokens` decode steps after each, batch 1. Raises Infeasible if the engine refuses."""
    request: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "timeout_s": TIMEOUT_S}
    with _alone(lock or MachineLock()) as alone, EngineChild(threads, pinned=True) as child:
        empty = child.ask(do="memory")["peak_bytes"]
        load_ms = child.ask(do="load", path=str(model), threads=threads, timeout_s=TIMEOUT_S)["load_ms"]
        warm = child.ask(do="time", **request)
        cpus = with_siblings(os.sched_getaffinity(child.pid))
        start, busy, waited = time.monotonic(), busy_seconds(cpus), waited_seconds(child.pid)
        turns = [child.ask(do="time", **request) for _ in range(ROUNDS)]
        taken = busy_seconds(cpus) - busy - (turns[-1]["cpu_s"] - warm["cpu_s"])
        foreign = max(0.0, taken, waited_seconds(child.pid) - waited) / max(1e-3, time.monotonic() - start)
        peak = child.ask(do="memory")["peak_bytes"] - empty
        found = child.ask(do="profile", path=str(model), threads=threads, repeats=REPEATS, **request)
    quiet = alone and foreign <= MOST_FOREIGN_CORES
    note = f"one process, not corrected for drift; at most {foreign:.2f} cores of its CPUs taken by others"
    measured = _latencies(turns, "measured" if quiet else "disturbed", note)
    measured["load_ms"] = Measurement(load_ms, "ms", load_ms, load_ms, "measured", 1, fingerprint(), "once")
    measured["peak_memory_bytes"] = Measurement.exact(float(peak), "bytes", "VmHWM over an empty engine's")
    return NodeProfile(measured, tuple(Node.from_dict(row) for row in found["rows"]), found["run_ms"])


def _latencies(turns: Sequence[dict[str, Any]], provenance: Provenance, note: str) -> dict[str, Measurement]:
    machine, found = fingerprint(), {}
    samples = {
        "ttft_ms": ("ms", [turn["ttft_ms"] for turn in turns]),
        "decode_ms_per_token": ("ms/token", [ms for turn in turns for ms in turn["step_ms"]]),
    }
    for name, (unit, values) in samples.items():
        found[name] = Measurement(*median_interval(values, unit), provenance, len(values), machine, note)
    d = found["decode_ms_per_token"]
    found["throughput_tokens_per_s"] = Measurement(
        1e3 / d.value, "tokens/s", 1e3 / d.high, 1e3 / d.low, provenance, d.samples, machine, f"batch 1; {note}"
    )
    return found


def median_interval(values: Sequence[float], unit: str) -> tuple[float, str, float, float]:
    """(median, unit, low, high): the 95 % interval of a median by order statistics; all values where there are fewer than 6."""
    ordered, n = sorted(values), len(values)
    if n < LEAST_FOR_INTERVAL:
        return median(ordered), unit, ordered[0], ordered[-1]
    below, rank = 0.0, 0
    while below + comb(n, rank) / 2**n <= 0.025:
        below += comb(n, rank) / 2**n
        rank += 1
    return median(ordered), unit, ordered[rank - 1], ordered[n - rank]


@contextlib.contextmanager
def _alone(lock: MachineLock) -> Iterator[bool]:
    """Whether the machine is ours; what others do shows in the times, but does not keep them from being taken."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.exclusive(WAIT_S))
        except EnvironmentProblem:
            yield False
        else:
            yield True
