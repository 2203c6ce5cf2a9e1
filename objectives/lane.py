"""The measuring lane: the candidate and a fixed reference take turns in two child processes under the machine lock.

Shared machines drift by tens of per cent within minutes; the ratio of two programs that alternate does not (A-B-B-A turns,
arXiv 2001.05811). A candidate's milliseconds are `median ratio × the reference's nominal milliseconds on this machine`, with
a bootstrap interval over the rounds. A value taken while something else was busy is not called measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from paretune.engines.child import EngineChild
from paretune.hardware_profiles.lock import MachineLock
from paretune.objectives.measurement import Measurement, Provenance

PROMPT, NEW_TOKENS = 128, 24
MIN_ROUNDS, MAX_ROUNDS = 8, 24
WANTED_HALF_WIDTH = 0.02
MOST_DRIFT = 1.35
MOST_FOREIGN_CORES = 0.35
RETRIES = 2


@dataclass(frozen=True)
class Nominal:
    """The reference's undisturbed milliseconds on this machine: what ratios are multiplied with."""

    decode_ms: float
    ttft_ms: float


@dataclass(frozen=True)
class LaneResult:
    """What one visit to the lane found. `stable` is False when the machine was disturbed in every attempt."""

    measurements: dict[str, Measurement]
    stable: bool


class Lane:
    """Keeps the reference's child alive between candidates. `nominal` reads or (given values) keeps the reference's figures."""

    def __init__(
        self,
        reference: Path,
        threads: int,
        fingerprint: str,
        lock: MachineLock,
        nominal: Callable[[Nominal | None], Nominal | None],
    ) -> None:
        self.threads, self.fingerprint, self.lock, self.nominal = threads, fingerprint, lock, nominal
        self.reference = EngineChild(threads)
        self.empty_bytes = float(self.reference.ask(do="memory")["peak_bytes"])
        self.reference.ask(do="load", path=str(reference), threads=threads)
        self.reference.ask(do="time", prompt=PROMPT, tokens=NEW_TOKENS)

    def close(self) -> None:
        self.reference.close()

    def measure(self, model: Path, child: EngineChild | None = None) -> LaneResult:
        """Decode (ms/token after 128 tokens, batch 1), TTFT (128 tokens), and in a fresh child load time and peak memory.

        `child` reuses an engine (its memory is then not reported). Raises Infeasible if the engine refuses the model.
        """
        if child is not None:
            return self._visit(model, child, fresh=False)
        with EngineChild(self.threads) as own:
            return self._visit(model, own, fresh=True)

    def _visit(self, model: Path, child: EngineChild, fresh: bool) -> LaneResult:
        loaded = child.ask(do="load", path=str(model), threads=self.threads)
        child.ask(do="time", prompt=PROMPT, tokens=NEW_TOKENS)
        for attempt in range(RETRIES + 1):
            with self.lock.exclusive():
                rounds = _Rounds(self.reference, child)
                foreign = rounds.run()
            stable = self._is_quiet(rounds, foreign)
            if stable:
                break
            time.sleep(0.5 * (attempt + 1))
        found = self._measurements(rounds, "measured" if stable else "disturbed", foreign)
        if fresh:
            peak = float(child.ask(do="memory")["peak_bytes"]) - self.empty_bytes
            found["peak_memory_bytes"] = Measurement.exact(
                peak, "bytes", "VmHWM of the engine's process less an empty engine's"
            )
            found["load_ms"] = Measurement(
                loaded["load_ms"],
                "ms",
                loaded["load_ms"],
                loaded["load_ms"],
                "measured",
                1,
                self.fingerprint,
                "one load",
            )
        return LaneResult(found, stable)

    def _is_quiet(self, rounds: _Rounds, foreign: float) -> bool:
        known = self.nominal(None)
        if known is None:
            if foreign <= MOST_FOREIGN_CORES:
                self.nominal(Nominal(median(rounds.reference_decode), median(rounds.reference_ttft)))
            return foreign <= MOST_FOREIGN_CORES
        drift = median(rounds.reference_decode) / known.decode_ms
        return foreign <= MOST_FOREIGN_CORES and 1 / MOST_DRIFT < drift < MOST_DRIFT

    def _measurements(self, rounds: _Rounds, provenance: Provenance, foreign: float) -> dict[str, Measurement]:
        known = self.nominal(None) or Nominal(median(rounds.reference_decode), median(rounds.reference_ttft))
        note = f"corrected by the reference's drift; {foreign:.2f} other cores busy"
        found = {}
        for name, ratios, scale, unit in (
            ("decode_ms_per_token", rounds.decode_ratios, known.decode_ms, "ms/token"),
            ("ttft_ms", rounds.ttft_ratios, known.ttft_ms, "ms"),
        ):
            value, low, high = median_interval(ratios)
            found[name] = Measurement(
                value * scale, unit, low * scale, high * scale, provenance, len(ratios), self.fingerprint, note
            )
        p90 = float(np.quantile(rounds.candidate_steps, 0.9))
        found["decode_p90_ms"] = Measurement(
            p90,
            "ms/token",
            p90,
            p90,
            provenance,
            len(rounds.candidate_steps),
            self.fingerprint,
            "not corrected for drift",
        )
        return found


class _Rounds:
    """R C C R turns until both intervals are narrow enough."""

    def __init__(self, reference: EngineChild, candidate: EngineChild) -> None:
        self.reference, self.candidate = reference, candidate
        self.decode_ratios: list[float] = []
        self.ttft_ratios: list[float] = []
        self.reference_decode: list[float] = []
        self.reference_ttft: list[float] = []
        self.candidate_steps: list[float] = []

    def run(self) -> float:
        """Measure; returns how many cores others used meanwhile."""
        start, busy, own = time.monotonic(), _busy_seconds(), self._own_seconds()
        while len(self.decode_ratios) < MIN_ROUNDS or (
            len(self.decode_ratios) < MAX_ROUNDS
            and not self._narrow()
            and self._foreign(start, busy, own) <= MOST_FOREIGN_CORES  # a disturbed visit will be repeated: end it early
        ):
            turns = [self._turn(child) for child in (self.reference, self.candidate, self.candidate, self.reference)]
            r = median(turns[0]["step_ms"] + turns[3]["step_ms"])
            c = median(turns[1]["step_ms"] + turns[2]["step_ms"])
            self.decode_ratios.append(c / r)
            self.ttft_ratios.append(
                (turns[1]["ttft_ms"] + turns[2]["ttft_ms"]) / (turns[0]["ttft_ms"] + turns[3]["ttft_ms"])
            )
            self.reference_decode.append(r)
            self.reference_ttft.append((turns[0]["ttft_ms"] + turns[3]["ttft_ms"]) / 2)
            self.candidate_steps += turns[1]["step_ms"] + turns[2]["step_ms"]
        return self._foreign(start, busy, own)

    def _foreign(self, start: float, busy: float, own: float) -> float:
        """Cores that others have used since `start`, when the machine had used `busy` and we `own` CPU seconds."""
        elapsed = max(1e-3, time.monotonic() - start)
        return max(0.0, (_busy_seconds() - busy - (self._own_seconds() - own)) / elapsed)

    def _turn(self, child: EngineChild) -> dict[str, Any]:
        return child.ask(do="time", prompt=PROMPT, tokens=NEW_TOKENS)

    def _narrow(self) -> bool:
        return all(_half_width(r) <= WANTED_HALF_WIDTH for r in (self.decode_ratios, self.ttft_ratios))

    def _own_seconds(self) -> float:
        ticks = os.sysconf("SC_CLK_TCK")
        total = time.process_time()
        for child in (self.reference, self.candidate):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
        return total


def median_interval(values: list[float], resamples: int = 1000) -> tuple[float, float, float]:
    """Median of the rounds with its 95 % bootstrap interval."""
    array = np.array(values)
    picks = np.random.default_rng(0).integers(0, len(array), (resamples, len(array)))
    low, high = np.quantile(np.median(array[picks], axis=1), [0.025, 0.975])
    return float(np.median(array)), float(low), float(high)


def _half_width(values: list[float]) -> float:
    value, low, high = median_interval(values, 200)
    return (high - low) / (2 * value)


def _busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used, without idle and waiting."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
