"""TTFT at several prompt lengths, decode at several context lengths and batch sizes: how an artifact's time grows.

Every point is measured as a candidate's standard times are, in turns with the same reference under the same lock, so that
the rows of the table can be compared with each other and with the front. Not part of a search: a point more costs a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paretune.common.errors import Infeasible
from paretune.objectives.energy import throughput
from paretune.objectives.latency.benchmark import RETRIES, VISITS, LatencyBenchmark
from paretune.objectives.latency.workload import NEW_TOKENS, BenchmarkSession, Workload
from paretune.objectives.measurement import Measurement

PROMPTS, CONTEXTS, BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048), (16, 128, 512, 1024, 2048), (1, 2, 4, 8)
BUSY = "other paretune work did not let go of the machine"


@dataclass(frozen=True)
class SweepPoint:
    """A prefill of `length` tokens ("ttft"), or decode steps after `length` tokens ("decode"), of `batch` sequences at once."""

    phase: Literal["ttft", "decode"]
    length: int
    batch: int = 1

    @property
    def turn(self) -> Workload:
        """The workload that times this point: 2 new tokens for TTFT, NEW_TOKENS for decode."""
        return Workload(self.length, 2 if self.phase == "ttft" else NEW_TOKENS, self.batch)


@dataclass(frozen=True)
class SweepRow:
    """`time`: ms of the prefill or of a decode step for the whole batch; `rate`: prompt or new tokens per second of all
    sequences together. Both are None where the engine refused, for `reason`."""

    point: SweepPoint
    time: Measurement | None
    rate: Measurement | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a dictionary, its measurements too."""
        return asdict(self)


def sweep_points(
    context: int, prompts: Sequence[int] = PROMPTS, contexts: Sequence[int] = CONTEXTS, batches: Sequence[int] = BATCHES
) -> list[SweepPoint]:
    """Prompts at batch 1, then every context with every batch, as far as they fit into `context` tokens."""
    ttft = [SweepPoint("ttft", n) for n in sorted(set(prompts)) if n + 2 <= context]
    fitting = [n for n in sorted(set(contexts)) if n + NEW_TOKENS <= context]
    return ttft + [SweepPoint("decode", n, batch) for batch in sorted(set(batches)) for n in fitting]


def sweep(benchmark: LatencyBenchmark, model: Path, points: Sequence[SweepPoint]) -> list[SweepRow]:
    """A row per point, over VISITS fresh pairs of processes and up to RETRIES more while any point lacks quiet visits.

    It is given up when RETRIES passes had no quiet visit at all. A point that the engine refuses is said and left out of further
    visits. Raises Infeasible if it refuses the model itself.
    """
    visits: dict[SweepPoint, list[BenchmarkSession]] = {point: [] for point in points}
    refused: dict[SweepPoint, str] = {}
    for number in range(VISITS + RETRIES):
        wanted = [p for p in points if p not in refused and _quiet(benchmark, visits[p]) < VISITS]
        hopeless = number >= RETRIES and not any(_quiet(benchmark, visits[p]) for p in wanted)
        if not wanted or hopeless or not _one_pass(benchmark, model, wanted, visits, refused):
            break
    for point in points:
        if not visits[point]:
            refused.setdefault(point, BUSY)
    return [_row(benchmark, point, visits[point], refused.get(point)) for point in points]


def is_quiet(rows: Iterable[SweepRow]) -> bool:
    """Whether every row that the engine did not refuse was measured."""
    return all(row.reason != BUSY if row.time is None else row.time.provenance == "measured" for row in rows)


def _one_pass(
    benchmark: LatencyBenchmark,
    model: Path,
    wanted: Sequence[SweepPoint],
    visits: Mapping[SweepPoint, list[BenchmarkSession]],
    refused: dict[SweepPoint, str],
) -> bool:
    """Every point once with one fresh pair of processes; a new pair after a refusal, which may have cost the child its life.

    False as soon as other work of ours keeps the machine: every further point would wait as long again.
    """
    left = list(wanted)
    while left:
        with benchmark.pair() as pair:
            benchmark.load(pair.candidate, model)
            while left:
                point = left.pop(0)
                try:
                    visit = benchmark.visit(pair, point.turn)
                except Infeasible as error:
                    refused[point] = error.problem
                    break
                visits[point].append(visit)
                if not visit.alone:
                    return False
    return True


def _quiet(benchmark: LatencyBenchmark, visits: Sequence[BenchmarkSession]) -> int:
    return len(visits) - benchmark.result(list(visits)).flagged if visits else 0


def _row(
    benchmark: LatencyBenchmark, point: SweepPoint, visits: list[BenchmarkSession], reason: str | None
) -> SweepRow:
    if reason is not None:
        return SweepRow(point, None, None, reason)
    found = benchmark.result(visits).measurements
    if point.phase == "decode":
        time = found["decode_ms_per_token"]
        return SweepRow(point, replace(time, unit="ms/step"), throughput(time, point.batch))
    time = found["ttft_ms"]
    rate = replace(throughput(time, point.length * point.batch), note="prompt tokens / TTFT")
    return SweepRow(point, time, rate)
