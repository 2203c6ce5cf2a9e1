"""Timing two engine children in turns, and watching what else the machine does meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from paretune.common.errors import UsageError
from paretune.engines.process.child import EngineChild

PROMPT, NEW_TOKENS = 128, 24
ROUNDS = 8
MOST_FOREIGN_CORES = 0.35
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Workload:
    """What a child does in one turn: a prefill of `prompt` tokens, then `tokens` decode steps, of `batch` sequences at once."""

    prompt: int = PROMPT
    tokens: int = NEW_TOKENS
    batch: int = 1

    def __post_init__(self) -> None:
        if min(self.prompt, self.tokens, self.batch) < 1:
            raise ValueError(f"prompt, tokens and batch must be 1 or more, but got {self}")


STANDARD = Workload()
LEAST_CONTEXT = 8


def workload_within(context: int) -> Workload:
    """The standard turn, or one that fills a context of fewer tokens: a quarter of it decode steps, NEW_TOKENS at most, the rest prompt.

    Raises UsageError for a context of fewer than LEAST_CONTEXT tokens.
    """
    if context < LEAST_CONTEXT:
        raise UsageError(
            f"the model's context must have {LEAST_CONTEXT} tokens or more to be timed, but max_position_embeddings is {context}",
            "choose a checkpoint with a longer context",
        )
    if context >= PROMPT + NEW_TOKENS:
        return STANDARD
    tokens = min(NEW_TOKENS, context // 4)
    return Workload(context - tokens, tokens)


@dataclass
class BenchmarkSession:
    """What `rounds` R C C R turns gave: ratios candidate/reference, the reference's own milliseconds, the candidate's steps.

    `foreign_cores`: what others took on the latency benchmark's CPUs. `alone`: the machine lock was held.
    """

    decode_ratios: list[float] = field(default_factory=list)
    ttft_ratios: list[float] = field(default_factory=list)
    reference_decode: list[float] = field(default_factory=list)
    reference_ttft: list[float] = field(default_factory=list)
    candidate_steps: list[float] = field(default_factory=list)
    foreign_cores: float = 0.0
    alone: bool = True

    @property
    def quiet(self) -> bool:
        """Whether others took less than a third of a core from the latency benchmark meanwhile, and no other work held the machine lock."""
        return self.alone and self.foreign_cores <= MOST_FOREIGN_CORES


def run_abba_rounds(
    reference: EngineChild, candidate: EngineChild, rounds: int = ROUNDS, alone: bool = True, turn: Workload = STANDARD
) -> BenchmarkSession:
    """Time `rounds` rounds of reference, candidate, candidate, reference. Both children are loaded and warm.

    `turn` is the candidate's workload; the reference always does the standard one. `alone`: the machine lock is held.
    A disturbed visit ends after half of its rounds, because it will be repeated.
    """
    visit, watch = BenchmarkSession(alone=alone), Watch([reference, candidate])
    for number in range(rounds):
        order = ((reference, STANDARD), (candidate, turn), (candidate, turn), (reference, STANDARD))
        turns = [run_workload(child, what) for child, what in order]
        r = median(turns[0]["step_ms"] + turns[3]["step_ms"])
        c = median(turns[1]["step_ms"] + turns[2]["step_ms"])
        reference_ttft = (turns[0]["ttft_ms"] + turns[3]["ttft_ms"]) / 2
        visit.decode_ratios.append(c / r)
        visit.ttft_ratios.append((turns[1]["ttft_ms"] + turns[2]["ttft_ms"]) / 2 / reference_ttft)
        visit.reference_decode.append(r)
        visit.reference_ttft.append(reference_ttft)
        visit.candidate_steps += turns[1]["step_ms"] + turns[2]["step_ms"]
        visit.foreign_cores = watch.foreign_cores()
        if not visit.quiet and number + 1 >= rounds // 2:
            break
    return visit


def load_and_warm(
    child: EngineChild,
    model: Path,
    threads: int,
    engine: str = "onnxruntime",
    provider: str = "CPUExecutionProvider",
    turn: Workload = STANDARD,
) -> float:
    """Load a model in an engine and run `turn` once; returns milliseconds of the load. Raises Infeasible if the engine refuses."""
    loaded = child.ask(do="load", path=str(model), threads=threads, engine=engine, provider=provider)
    run_workload(child, turn)
    return float(loaded["load_ms"])


def run_workload(child: EngineChild, turn: Workload) -> dict[str, Any]:
    """`ttft_ms` of the prefill and `step_ms` of each decode step. Raises Infeasible if the engine refuses, crashes or hangs."""
    return child.ask(do="time", prompt=turn.prompt, tokens=turn.tokens, batch=turn.batch)


class Watch:
    """How many cores others took from the children since it was made: on the CPUs that the children may run on (steal
    included), and as time that the children waited for a CPU. What runs on other CPUs does not disturb by itself; what it
    does to shared caches and memory shows in the reference."""

    def __init__(self, children: list[EngineChild]) -> None:
        self.children = children
        self.cpus = with_siblings(set().union(*(os.sched_getaffinity(child.pid) for child in children)))
        self.start, self.busy, self.own = time.monotonic(), busy_seconds(self.cpus), self._own_seconds()
        self.waited = self._waited_seconds()

    def foreign_cores(self) -> float:
        """Return how many cores others took on average since the watch was made, at least 0."""
        elapsed = max(1e-3, time.monotonic() - self.start)
        taken = busy_seconds(self.cpus) - self.busy - (self._own_seconds() - self.own)
        return max(0.0, taken, self._waited_seconds() - self.waited) / elapsed

    def _own_seconds(self) -> float:
        ticks, total = os.sysconf("SC_CLK_TCK"), 0.0
        for child in self.children:
            fields = (
                Path(f"/proc/{child.pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
            )
            total += (int(fields[11]) + int(fields[12])) / ticks
        return total

    def _waited_seconds(self) -> float:
        return sum(waited_seconds(child.pid) for child in self.children)


def busy_seconds(cpus: Set[int]) -> float:
    """CPU seconds that all processes have used on `cpus`, with what the hypervisor took, without idle and waiting."""
    total = 0
    for line in STAT.read_text(encoding="utf-8").splitlines():
        name, *rest = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cpus:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) for x in rest[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")


def waited_seconds(pid: int) -> float:
    """Seconds that the threads of a process could have run but had to wait for a CPU (involuntary switches and queueing); 0
    where the kernel does not say."""
    total = 0
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # a thread may end meanwhile
            total += int(task.read_text(encoding="utf-8").split()[1])
    return total / 1e9


def with_siblings(cpus: Set[int]) -> Set[int]:
    """`cpus` and the hardware threads that share their cores."""
    found = set(cpus)
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        with contextlib.suppress(OSError, ValueError):
            for part in path.read_text(encoding="utf-8").strip().split(","):
                first, _, last = part.partition("-")
                found |= set(range(int(first), int(last or first) + 1))
    return found
