"""Energy per token from a counter: what longer generations take more than shorter ones, so that the prefill cancels.

A step takes a fraction of a millisecond and counters tick every millisecond or slower, so generations repeat until
an interval is long enough for its counter.
"""

from __future__ import annotations

import math
import time
from statistics import mean, stdev

from paretune.engines.process.child import EngineChild
from paretune.objectives.latency.power import EnergyCounter
from paretune.objectives.latency.workload import STANDARD, Workload, run_workload

SAMPLES = 5


def joules_per_token(
    child: EngineChild, counter: EnergyCounter, turn: Workload = STANDARD
) -> tuple[float, float, float]:
    """Joules per decode step after `turn.prompt` tokens, batch 1, and its 95 % interval (Student's t over SAMPLES pairs,
    no less than 0)."""
    from scipy.stats import t

    slopes, steps = [], (1 if turn.tokens <= 2 else 2, turn.tokens)
    for _ in range(SAMPLES):
        short, long = (_joules_per_call(child, counter, Workload(turn.prompt, tokens)) for tokens in steps)
        slopes.append((long - short) / (steps[1] - steps[0]))
    value = mean(slopes)
    half = float(t.ppf(0.975, SAMPLES - 1)) * stdev(slopes) / math.sqrt(SAMPLES)
    return value, max(0.0, value - half), value + half


def _joules_per_call(child: EngineChild, counter: EnergyCounter, turn: Workload) -> float:
    start, end, calls = counter.joules(), time.monotonic() + counter.settle_s, 0
    while calls == 0 or time.monotonic() < end:
        run_workload(child, turn)
        calls += 1
    return (counter.joules() - start) / calls
