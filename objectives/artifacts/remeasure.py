"""Measuring an artifact again, alone, and holding it against what its study said."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.common.checksums import MODEL, check_artifact
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.hardware_profiles.profile import Profile, load_profile
from paretune.objectives.energy import COST, ENERGY, THROUGHPUT, following
from paretune.objectives.latency.benchmark import LatencyResult
from paretune.objectives.latency.workload import STANDARD, workload_within
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import FORWARD, forward_measurements

COMPARED = ("decode_ms_per_token", "ttft_ms")
CLOSE = 0.03
TOLD = {THROUGHPUT: "throughput, one stream", ENERGY: "energy", COST: "cost, one stream"}


@dataclass(frozen=True)
class Agreement:
    """One quantity now and then. `agrees`: the interval of the difference contains 0, or the values are within 3 %."""

    name: str
    now: Measurement
    then: Measurement | None

    @property
    def difference(self) -> tuple[float, float, float]:
        """now - then with its interval (independent errors added in squares)."""
        assert self.then is not None
        value = self.now.value - self.then.value
        low = ((self.now.value - self.now.low) ** 2 + (self.then.high - self.then.value) ** 2) ** 0.5
        high = ((self.now.high - self.now.value) ** 2 + (self.then.value - self.then.low) ** 2) ** 0.5
        return value, value - low, value + high

    @property
    def agrees(self) -> bool | None:
        """None where there is nothing to compare with, or one of the two was disturbed or taken on another machine."""
        if (
            self.then is None
            or "disturbed" in (self.now.provenance, self.then.provenance)
            or self.then.fingerprint != self.now.fingerprint
        ):
            return None
        value, low, high = self.difference
        return low <= 0 <= high or abs(value) < CLOSE * abs(self.then.value)


@dataclass(frozen=True)
class Remeasured:
    """All quantities of a session. `benchmark` is what the latency benchmark itself said; `within` the half-width it was asked for."""

    artifact: Path
    profile: str
    within: float
    benchmark: LatencyResult
    agreements: tuple[Agreement, ...]
    others: dict[str, Measurement]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data: what was found now, and beside it what the study said."""
        return {
            "artifact": str(self.artifact),
            "profile": self.profile,
            "measured": self.benchmark.stable,
            "half_width": self.benchmark.half_width,
            "visits": self.benchmark.visits,
            "disturbed_visits": self.benchmark.flagged,
            "others": {n: m.to_dict() for n, m in self.others.items()},
            "compared": {
                a.name: {
                    "now": a.now.to_dict(),
                    "then": a.then.to_dict() if a.then else None,
                    "agrees": a.agrees,
                    "difference": a.difference if a.then else None,
                }
                for a in self.agreements
            },
        }

    def lines(self) -> list[str]:
        """Return lines for people: latencies against the study's, then what else was measured."""
        found = []
        for a in self.agreements:
            text = f"{a.name}: {a.now.value:.4f} [{a.now.low:.4f} … {a.now.high:.4f}] {a.now.unit} ({a.now.provenance})"
            if a.then is not None:
                value, low, high = a.difference
                verdict = {
                    True: "agrees",
                    False: "DIFFERS",
                    None: "cannot be compared (disturbed, or another machine)",
                }[a.agrees]
                text += (
                    f"; the study said {a.then.value:.4f}, difference {value / a.then.value:+.1%} "
                    f"[{low / a.then.value:+.1%} … {high / a.then.value:+.1%}]: {verdict}"
                )
            found.append(text)
        memory = self.others["peak_memory_bytes"]
        return [
            *found,
            *(
                f"{title}: {m.value:.4g} [{m.low:.4g} … {m.high:.4g}] {m.unit} ({m.provenance})"
                for name, title in TOLD.items()
                if (m := self.others.get(name)) is not None
            ),
            f"peak memory: {memory.value / 1e6:.1f} MB ({memory.note})",
            f"load: {self.others['load_ms'].value:.1f} ms",
        ]

    def problem(self) -> EnvironmentProblem | None:
        """Why the values may not be called measured; None if they may."""
        benchmark = self.benchmark
        if benchmark.stable:
            return None
        if benchmark.visits - benchmark.flagged < 2:
            found = f"{benchmark.flagged} of {benchmark.visits} benchmark sessions were disturbed by other work"
        else:
            widest = f"±{benchmark.half_width:.1%} after {benchmark.visits} visits"
            found = f"the intervals should be ±{self.within:.1%}, but the widest is {widest}"
        return EnvironmentProblem(
            f"nothing was measured: {found}",
            "end the other work on this machine and repeat, or ask for less with --within",
        )


def remeasure(
    artifact: Path, profile_name: str, home: Path, within: float = CLOSE, agent: str | None = None
) -> Remeasured:
    """Run the latency benchmark on an artifact, in the engine and with the threads of a profile, until the 95 % intervals are `within`.

    `agent`: URL of the agent that does it; without one, the profile's, or this machine. Raises UsageError if the artifact is
    damaged or nothing measures the profile, Infeasible if the engine refuses it.
    """
    from paretune.objectives.agent.remote import open_benchmark

    facts = check_artifact(artifact)
    is_module = facts.get("kind") == "module"
    compared = (FORWARD,) if is_module else COMPARED
    profile = load_profile(profile_name, home)
    if agent is None and profile.agent is None:
        require_at_hand(profile)
    turn = STANDARD if is_module else workload_within(context_of(artifact))
    benchmark = open_benchmark(profile, home, agent, turn).measure((artifact / MODEL).resolve(), within)
    if is_module:
        found = forward_measurements(benchmark.measurements)
    else:
        found = following(benchmark.measurements["decode_ms_per_token"], profile) | benchmark.measurements
    kept = (
        {name: Measurement.from_dict(data) for name, data in facts.get("measurements", {}).items()}
        if facts.get("profile") == profile.name
        else {}
    )
    agreements = tuple(Agreement(name, found[name], kept.get(name)) for name in compared)
    others = {name: m for name, m in found.items() if name not in compared}
    return Remeasured(artifact, profile.name, within, benchmark, agreements, others)


def context_of(artifact: Path) -> int:
    """The longest sequence of a decoder's artifact, in tokens."""
    return int(
        json.loads((artifact / "onnx" / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"]
    )


def require_at_hand(profile: Profile) -> None:
    """Raises UsageError for a target that is not this machine."""
    if not profile.at_hand or profile.agent is not None:
        raise UsageError(
            f"a profile must be at hand to be measured, but {profile.name} is another machine",
            "measure on that machine, or name a profile of this one",
        )
