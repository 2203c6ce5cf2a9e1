"""The measuring lane: the candidate and a fixed reference take turns in two child processes under the machine lock.

Shared machines drift by tens of per cent within minutes; the ratio of two programs that alternate does not (A-B-B-A turns,
arXiv 2001.05811). What remains differs from process to process (where its pages lie), so a candidate is visited with several
fresh pairs of processes: its milliseconds are the mean over visits of `median ratio × the reference's nominal milliseconds`,
and the interval comes from the spread between visits, pooled with the spread that the reference itself shows on this machine
(a moderated variance, Smyth 2004). A value taken while something else was busy is not called measured.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np

from paretune.engines.child import EngineChild
from paretune.hardware_profiles.errors import EnvironmentProblem
from paretune.hardware_profiles.lock import MachineLock
from paretune.objectives.measurement import Measurement, Provenance
from paretune.objectives.turns import Visit, load_and_warm, take_turns

VISITS, RETRIES = 3, 2
NOMINAL_VISITS = 5
LEAST_SPREAD = 0.008
MOST_DRIFT = 1.35


@dataclass(frozen=True)
class Nominal:
    """The reference's undisturbed milliseconds on this machine, and the standard deviation of its ratio to itself between
    pairs of processes."""

    decode_ms: float
    ttft_ms: float
    decode_spread: float = LEAST_SPREAD
    ttft_spread: float = LEAST_SPREAD


@dataclass(frozen=True)
class LaneResult:
    """What the lane found. `stable` is False when the machine was disturbed in too many attempts."""

    measurements: dict[str, Measurement]
    stable: bool


@dataclass(frozen=True)
class Pair:
    """A reference that is loaded and warm, and a candidate's child beside it."""

    reference: EngineChild
    candidate: EngineChild


class Lane:
    """`nominal` reads or (given values) keeps the reference's figures of this machine."""

    def __init__(
        self,
        reference: Path,
        threads: int,
        fingerprint: str,
        lock: MachineLock,
        nominal: Callable[[Nominal | None], Nominal | None],
    ) -> None:
        self.reference, self.threads, self.fingerprint, self.lock, self.nominal = (
            reference,
            threads,
            fingerprint,
            lock,
            nominal,
        )

    @contextlib.contextmanager
    def pair(self) -> Iterator[Pair]:
        """Two fresh children, both started before either is waited for."""
        with EngineChild(self.threads, pinned=True) as reference, EngineChild(self.threads, pinned=True) as candidate:
            load_and_warm(reference, self.reference, self.threads)
            yield Pair(reference, candidate)

    def measure(self, model: Path) -> LaneResult:
        """Decode (ms/token after 128 tokens, batch 1) and TTFT (128 tokens) over VISITS fresh pairs; load time, peak memory.

        Raises Infeasible if the engine refuses the model.
        """
        visits: list[Visit] = []
        while sum(self._stable(v) for v in visits) < VISITS and len(visits) < VISITS + RETRIES:
            if visits and not self._stable(visits[-1]):
                time.sleep(0.5)
            with self.pair() as pair:
                load_and_warm(pair.candidate, model, self.threads)
                visits.append(self._visit(pair))
            if not visits[-1].alone:  # waiting as long again for every visit would stop the search instead
                break
        quiet = [v for v in visits if self._stable(v)]
        stable = len(quiet) >= 2
        found = self._latencies(quiet if stable else visits, "measured" if stable else "disturbed")
        found |= self._memory(model)
        return LaneResult(found, stable)

    def _memory(self, model: Path) -> dict[str, Measurement]:
        """Load time and peak memory in a child with ordinary pages, as a user's process would have."""
        with EngineChild(self.threads) as child:
            empty = float(child.ask(do="memory")["peak_bytes"])
            load = load_and_warm(child, model, self.threads)
            peak = float(child.ask(do="memory")["peak_bytes"]) - empty
        return {
            "peak_memory_bytes": Measurement.exact(
                peak, "bytes", "VmHWM of the engine's process less an empty engine's"
            ),
            "load_ms": Measurement(
                load, "ms", load, load, "measured", 1, self.fingerprint, "one load from a warm disk cache"
            ),
        }

    def quick(self, model: Path, pair: Pair) -> LaneResult:
        """One visit with children that are already there: for the latency fit, where many candidates average out."""
        load_and_warm(pair.candidate, model, self.threads)
        visit = self._visit(pair)
        stable = self._stable(visit)
        return LaneResult(self._latencies([visit], "measured" if stable else "disturbed"), stable)

    def _visit(self, pair: Pair) -> Visit:
        """One visit under the machine lock. If other work of ours keeps the machine, it is made all the same and not called quiet."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.lock.exclusive())
            except EnvironmentProblem:
                return take_turns(pair.reference, pair.candidate, alone=False)
            self._learn_nominal()
            return take_turns(pair.reference, pair.candidate)

    def _learn_nominal(self) -> None:
        """Once per machine: the reference against itself in fresh pairs of processes. Kept only if the machine was quiet."""
        if self.nominal(None) is not None:
            return
        found = []
        for _ in range(NOMINAL_VISITS):
            with self.pair() as pair:
                load_and_warm(pair.candidate, self.reference, self.threads)
                found.append(take_turns(pair.reference, pair.candidate))
        if all(visit.quiet for visit in found):
            self.nominal(
                Nominal(
                    median(ms for v in found for ms in v.reference_decode),
                    median(ms for v in found for ms in v.reference_ttft),
                    max(LEAST_SPREAD, robust_spread([median(v.decode_ratios) for v in found])),
                    max(LEAST_SPREAD, robust_spread([median(v.ttft_ratios) for v in found])),
                )
            )

    def _stable(self, visit: Visit) -> bool:
        known = self.nominal(None)
        return (
            known is not None
            and visit.quiet
            and 1 / MOST_DRIFT < median(visit.reference_decode) / known.decode_ms < MOST_DRIFT
        )

    def _latencies(self, visits: list[Visit], provenance: Provenance) -> dict[str, Measurement]:
        foreign = max(v.foreign_cores for v in visits)
        fallback = Nominal(median(visits[0].reference_decode), median(visits[0].reference_ttft))
        known = self.nominal(None) or fallback
        shared = "" if all(v.alone for v in visits) else "; other paretune work did not let go of the machine"
        note = (
            f"{len(visits)} fresh pairs of processes, corrected by the reference's drift; "
            f"at most {foreign:.2f} cores of its CPUs taken by others{shared}"
        )
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
        steps = [ms for v in visits for ms in v.candidate_steps]
        p90 = float(np.quantile(steps, 0.9))
        found["decode_p90_ms"] = Measurement(
            p90, "ms/token", p90, p90, provenance, len(steps), self.fingerprint, "not corrected for drift"
        )
        return found


def robust_spread(values: list[float]) -> float:
    """Standard deviation by the median absolute deviation: one odd process in five must not widen every interval for ever."""
    center = median(values)
    return 1.4826 * median(abs(v - center) for v in values)


def moderated_interval(
    values: list[float], spread: float, prior_df: int = NOMINAL_VISITS - 1
) -> tuple[float, float, float]:
    """Mean of the visits and its 95 % interval; their variance is pooled with (spread × mean)² seen on `prior_df` degrees of freedom."""
    from scipy.stats import t

    center, n = mean(values), len(values)
    squares = prior_df * (spread * center) ** 2 + sum((v - center) ** 2 for v in values)
    df = prior_df + n - 1
    half = float(t.ppf(0.975, df)) * math.sqrt(squares / df / n)
    return center, center - half, center + half
