"""Timing two engine children in turns, and watching what else the machine does meanwhile."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from paretune.engines.child import EngineChild

PROMPT, NEW_TOKENS = 128, 24
ROUNDS = 8
MOST_FOREIGN_CORES = 0.35


@dataclass
class Visit:
    """What `rounds` R C C R turns gave: ratios candidate/reference, the reference's own milliseconds, the candidate's steps."""

    decode_ratios: list[float] = field(default_factory=list)
    ttft_ratios: list[float] = field(default_factory=list)
    reference_decode: list[float] = field(default_factory=list)
    reference_ttft: list[float] = field(default_factory=list)
    candidate_steps: list[float] = field(default_factory=list)
    foreign_cores: float = 0.0

    @property
    def quiet(self) -> bool:
        """Whether others used less than a third of a core meanwhile."""
        return self.foreign_cores <= MOST_FOREIGN_CORES


def take_turns(reference: EngineChild, candidate: EngineChild, rounds: int = ROUNDS) -> Visit:
    """Both children have a model loaded and are warm. A disturbed visit ends after half of its rounds: it will be repeated."""
    visit, watch = Visit(), _Watch([reference, candidate])
    for number in range(rounds):
        turns = [_turn(child) for child in (reference, candidate, candidate, reference)]
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


def load_and_warm(child: EngineChild, model: Path, threads: int) -> float:
    """Load a model and run it once; returns milliseconds of the load."""
    loaded = child.ask(do="load", path=str(model), threads=threads)
    _turn(child)
    return float(loaded["load_ms"])


def _turn(child: EngineChild) -> dict[str, Any]:
    return child.ask(do="time", prompt=PROMPT, tokens=NEW_TOKENS)


class _Watch:
    """How many cores other processes have used since it was made."""

    def __init__(self, children: list[EngineChild]) -> None:
        self.children = children
        self.start, self.busy, self.own = time.monotonic(), busy_seconds(), self._own_seconds()

    def foreign_cores(self) -> float:
        elapsed = max(1e-3, time.monotonic() - self.start)
        return max(0.0, (busy_seconds() - self.busy - (self._own_seconds() - self.own)) / elapsed)

    def _own_seconds(self) -> float:
        ticks, total = os.sysconf("SC_CLK_TCK"), time.process_time()
        for child in self.children:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
        return total


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used, without idle and waiting."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
