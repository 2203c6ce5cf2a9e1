"""The latency benchmark: the candidate and a fixed reference take turns in two child processes under the machine lock.

Shared machines drift by tens of per cent within minutes; the ratio of two programs that alternate does not (A-B-B-A turns,
arXiv 2001.05811). What remains differs from process to process (where its pages lie), so a candidate is visited with several
fresh pairs of processes: its milliseconds are the mean over visits of `median ratio × the reference's nominal milliseconds`,
and the interval comes from the spread between visits, pooled with the spread that the reference itself shows on this machine
(a moderated variance, Smyth 2004). A rare visit far from all others is left out, said, and replaced by another. A value
taken while something else was busy is not called measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from paretune.common.errors import EnvironmentProblem
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles.lock import MachineLock
from paretune.objectives.energy import ENERGY, THROUGHPUT, throughput
from paretune.objectives.latency.energy_pass import SAMPLES, joules_per_token
from paretune.objectives.latency.intervals import PRIOR_DF, half_width, moderated_interval, odd_ones, robust_spread
from paretune.objectives.latency.power import EnergyCounter
from paretune.objectives.latency.workload import (
    MOST_FOREIGN_CORES,
    STANDARD,
    BenchmarkSession,
    Watch,
    Workload,
    load_and_warm,
    run_abba_rounds,
    run_workload,
)
from paretune.objectives.measurement import Measurement, Provenance

VISITS, RETRIES = 3, 2
MOST_VISITS, MOST_DISTURBED = 12, 4  # where an interval is asked for
NOMINAL_VISITS = PRIOR_DF + 1
LEAST_SPREAD = 0.008
MOST_DRIFT = 1.35
LATENCIES = ("decode_ms_per_token", "ttft_ms")


@dataclass(frozen=True)
class Nominal:
    """The reference's undisturbed milliseconds on this machine, and the standard deviation of its ratio to itself between
    pairs of processes."""

    decode_ms: float
    ttft_ms: float
    decode_spread: float = LEAST_SPREAD
    ttft_spread: float = LEAST_SPREAD


@dataclass(frozen=True)
class LatencyResult:
    """What the latency benchmark found. `stable` is False when the machine was disturbed in too many attempts, or the interval that was
    asked for was not reached. Of `visits` attempts `flagged` were disturbed. `half_width` is that of the widest latency's
    95 % interval, as a fraction of its value."""

    measurements: dict[str, Measurement]
    stable: bool
    visits: int = 1
    flagged: int = 0

    @property
    def half_width(self) -> float:
        """Half-width of the wider latency's 95 % interval, as a fraction of its value; 0 without latencies."""
        found = [self.measurements[name] for name in LATENCIES if name in self.measurements]
        return max((half_width(m.low, m.value, m.high) for m in found), default=0.0)


@dataclass(frozen=True)
class Pair:
    """A reference that is loaded and warm, and a candidate's child beside it."""

    reference: EngineChild
    candidate: EngineChild


class LatencyBenchmark:
    """`nominal` reads or (given values) keeps the reference's figures of this machine. The candidate runs in `engine` with
    `provider`; the reference always in ONNX Runtime. `counter` opens the machine's counter of energy, if it has one. `turn` is what
    a candidate is timed with, shorter than the standard one where its context is."""

    def __init__(
        self,
        reference: Path,
        threads: int,
        fingerprint: str,
        lock: MachineLock,
        nominal: Callable[[Nominal | None], Nominal | None],
        engine: str = "onnxruntime",
        provider: str = "CPUExecutionProvider",
        counter: Callable[[], EnergyCounter | None] = lambda: None,
        turn: Workload = STANDARD,
    ) -> None:
        self.reference, self.threads, self.fingerprint, self.lock, self.nominal = (
            reference,
            threads,
            fingerprint,
            lock,
            nominal,
        )
        self.engine, self.provider, self.counter, self.turn = engine, provider, counter, turn

    @contextlib.contextmanager
    def pair(self) -> Iterator[Pair]:
        """Two fresh children, both started before either is waited for."""
        with EngineChild(self.threads, pinned=True) as reference, self._candidate(pinned=True) as candidate:
            load_and_warm(reference, self.reference, self.threads)
            yield Pair(reference, candidate)

    def _candidate(self, pinned: bool) -> EngineChild:
        return EngineChild(self.threads, pinned=pinned, engine=self.engine)

    def load(self, child: EngineChild, model: Path) -> float:
        """Load the candidate's model in the candidate's engine; milliseconds. Raises Infeasible if the engine refuses it."""
        return load_and_warm(child, model, self.threads, self.engine, self.provider, self.turn)

    def measure(self, model: Path, within: float | None = None) -> LatencyResult:
        """Latencies as `latencies` takes them; load time, peak memory, and energy where a counter can be read."""
        found = self.latencies(model, within)
        energy = self._energy(model) if found.stable else {}
        return replace(found, measurements=found.measurements | self._memory(model) | energy)

    def latencies(self, model: Path, within: float | None = None) -> LatencyResult:
        """Decode (ms/token after 128 tokens, batch 1), TTFT (128 tokens) and throughput over VISITS fresh pairs; after fewer
        tokens where the latency benchmark's turn has fewer.

        With `within` (half-width of the 95 % intervals, a fraction) there are more of them, MOST_VISITS at most, until it is
        reached; where it is not, the result is not stable. Raises Infeasible if the engine refuses the model.
        """
        visits: list[BenchmarkSession] = []
        while self._wants_more(visits, within):
            if visits and not self._stable(visits[-1]):
                time.sleep(0.5)
            with self.pair() as pair:
                self.load(pair.candidate, model)
                visits.append(self.visit(pair))
            if not visits[-1].alone:  # waiting as long again for every visit would stop the search instead
                break
        found = self.result(visits)
        if within is None or not found.stable or found.half_width <= within:
            return found
        wide = f"; ±{within:.1%} was not reached in {len(visits)} visits"
        told = {n: replace(m, provenance="disturbed", note=m.note + wide) for n, m in found.measurements.items()}
        return replace(found, measurements=told, stable=False)

    def _wants_more(self, visits: list[BenchmarkSession], within: float | None) -> bool:
        quiet = [v for v in visits if self._stable(v)]
        usual = len(self._usual(quiet))
        if within is None:
            return usual < VISITS and len(visits) < VISITS + RETRIES
        if len(visits) >= MOST_VISITS or len(visits) - len(quiet) >= MOST_DISTURBED:
            return False
        return usual < VISITS or self.result(visits).half_width > within

    def result(self, visits: list[BenchmarkSession]) -> LatencyResult:
        """The quiet ones of `visits` as latencies; all of them, called disturbed, where fewer than two were quiet."""
        quiet = [v for v in visits if self._stable(v)]
        stable = len(quiet) >= 2
        found = self._latencies(quiet if stable else visits, "measured" if stable else "disturbed")
        return LatencyResult(found, stable, len(visits), len(visits) - len(quiet))

    def _memory(self, model: Path) -> dict[str, Measurement]:
        """Load time and peak memory in a child with ordinary pages, as a user's process would have."""
        with self._candidate(pinned=False) as child:
            empty = float(child.ask(do="memory")["peak_bytes"])
            load = self.load(child, model)
            peak = float(child.ask(do="memory")["peak_bytes"]) - empty
        return {
            "peak_memory_bytes": Measurement.exact(
                peak, "bytes", "VmHWM of the engine's process less an empty engine's"
            ),
            "load_ms": Measurement(
                load, "ms", load, load, "measured", 1, self.fingerprint, "one load from a warm disk cache"
            ),
        }

    def _energy(self, model: Path) -> dict[str, Measurement]:
        """Joules per token by the machine's counter, under the machine lock; nothing where there is none."""
        counter = self.counter()
        if counter is None:
            return {}
        with contextlib.ExitStack() as stack:
            stack.callback(counter.close)
            child = stack.enter_context(self._candidate(pinned=True))
            self.load(child, model)
            try:
                stack.enter_context(self.lock.exclusive())
            except EnvironmentProblem:
                return {}
            watch = Watch([child])
            value, low, high = joules_per_token(child, counter, self.turn)
            quiet = watch.foreign_cores() <= MOST_FOREIGN_CORES
        if value <= 0:  # noise was more than what decoding took
            return {}
        provenance: Provenance = "measured" if quiet else "disturbed"
        return {ENERGY: Measurement(value, "J/token", low, high, provenance, SAMPLES, self.fingerprint, counter.source)}

    def quick(self, model: Path, pair: Pair) -> LatencyResult:
        """One visit with children that are already there: for the latency fit, where many candidates average out."""
        self.load(pair.candidate, model)
        visit = self.visit(pair)
        stable = self._stable(visit)
        return LatencyResult(self._latencies([visit], "measured" if stable else "disturbed"), stable)

    def visit(self, pair: Pair, other: Workload | None = None) -> BenchmarkSession:
        """One visit under the machine lock, with the latency benchmark's turn or with `other`.

        If other work of ours keeps the machine, it is made all the same and not called quiet.
        """
        turn = self.turn if other is None else other
        if turn != self.turn:  # buffers grow with the first run of a shape
            run_workload(pair.candidate, turn)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.lock.exclusive())
            except EnvironmentProblem:
                return run_abba_rounds(pair.reference, pair.candidate, alone=False, turn=turn)
            self._learn_nominal()
            return run_abba_rounds(pair.reference, pair.candidate, turn=turn)

    def _learn_nominal(self) -> None:
        """Once per machine: the reference against itself in fresh pairs of processes. Kept only if the machine was quiet."""
        if self.nominal(None) is not None:
            return
        found = []
        for _ in range(NOMINAL_VISITS):
            with EngineChild(self.threads, pinned=True) as first, EngineChild(self.threads, pinned=True) as second:
                load_and_warm(first, self.reference, self.threads)
                load_and_warm(second, self.reference, self.threads)
                found.append(run_abba_rounds(first, second))
            if not found[-1].quiet:
                return
        self.nominal(
            Nominal(
                median(ms for v in found for ms in v.reference_decode),
                median(ms for v in found for ms in v.reference_ttft),
                max(LEAST_SPREAD, robust_spread([median(v.decode_ratios) for v in found])),
                max(LEAST_SPREAD, robust_spread([median(v.ttft_ratios) for v in found])),
            )
        )

    def _stable(self, visit: BenchmarkSession) -> bool:
        known = self.nominal(None)
        return (
            known is not None
            and visit.quiet
            and 1 / MOST_DRIFT < median(visit.reference_decode) / known.decode_ms < MOST_DRIFT
        )

    def _usual(self, visits: list[BenchmarkSession]) -> list[BenchmarkSession]:
        """`visits` without those of odd processes, by either latency: steady in itself, but far from all others. What is
        unsteady in itself, too, is a noisy machine, and its noise belongs into the interval."""
        known = self.nominal(None)
        if known is None or not visits:
            return visits
        odd: set[int] = set()
        for ratios, spread in (
            ([v.decode_ratios for v in visits], known.decode_spread),
            ([v.ttft_ratios for v in visits], known.ttft_spread),
        ):
            noise = median(robust_spread(r) / median(r) for r in ratios)
            odd |= odd_ones([median(r) for r in ratios], max(spread, noise))
        return [v for i, v in enumerate(visits) if i not in odd]

    def _latencies(self, taken: list[BenchmarkSession], provenance: Provenance) -> dict[str, Measurement]:
        visits = self._usual(taken)
        foreign = max(v.foreign_cores for v in visits)
        fallback = Nominal(median(visits[0].reference_decode), median(visits[0].reference_ttft))
        known = self.nominal(None) or fallback
        shared = "" if all(v.alone for v in visits) else "; other paretune work did not let go of the machine"
        left = f", {len(taken) - len(visits)} odd ones left out" if len(visits) < len(taken) else ""
        note = (
            f"{len(visits)} fresh pairs of processes{left}, corrected by the reference's drift; "
            f"at most {foreign:.2f} cores of its CPUs taken by others{shared}"
        )
        if self.turn != STANDARD:
            note += f"; {self.turn.tokens} tokens after a prompt of {self.turn.prompt}, all that the context holds"
        rounds = sum(len(v.decode_ratios) for v in visits)
        found = {}
        for name, unit, ratios, scale, spread in (
            (
                "decode_ms_per_token",
                "ms/token",
                [median(v.decode_ratios) for v in visits],
                known.decode_ms,
                known.decode_spread,
            ),
            ("ttft_ms", "ms", [median(v.ttft_ratios) for v in visits], known.ttft_ms, known.ttft_spread),
        ):
            value, low, high = moderated_interval(ratios, spread)
            found[name] = Measurement(
                value * scale, unit, low * scale, high * scale, provenance, rounds, self.fingerprint, note
            )
        found[THROUGHPUT] = throughput(found["decode_ms_per_token"])
        steps = [ms for v in visits for ms in v.candidate_steps]
        p90 = float(np.quantile(steps, 0.9))
        found["decode_p90_ms"] = Measurement(
            p90, "ms/token", p90, p90, provenance, len(steps), self.fingerprint, "not corrected for drift"
        )
        return found
