"""Measuring an artifact again, alone, and holding it against what its study said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.compression.export.checksums import MODEL, check_artifact
from paretune.hardware_profiles.profile import load_profile
from paretune.objectives.figures import FORWARD, forward_measurements
from paretune.objectives.measurement import Measurement

COMPARED = ("decode_ms_per_token", "ttft_ms")
CLOSE = 0.03


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
        return low <= 0 <= high or abs(value) / self.then.value < CLOSE


@dataclass(frozen=True)
class Remeasured:
    """All quantities of one visit to the lane."""

    artifact: Path
    agreements: tuple[Agreement, ...]
    others: dict[str, Measurement]

    def to_dict(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact),
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
            f"peak memory: {memory.value / 1e6:.1f} MB ({memory.note})",
            f"load: {self.others['load_ms'].value:.1f} ms",
        ]


def remeasure(artifact: Path, profile_name: str, home: Path, agent: str | None = None) -> Remeasured:
    """Run the lane on an artifact, here or at an `agent` (URL). Raises UsageError if it is damaged, Infeasible if the engine refuses it."""
    from paretune.search.elsewhere import lane_at

    facts = check_artifact(artifact)
    is_module = facts.get("kind") == "module"
    compared = (FORWARD,) if is_module else COMPARED
    profile = load_profile(profile_name, home)
    found = lane_at(profile, home, agent).measure((artifact / MODEL).resolve()).measurements
    if is_module:
        found = forward_measurements(found)
    kept = (
        {name: Measurement.from_dict(data) for name, data in facts.get("measurements", {}).items()}
        if facts.get("profile") == profile.name
        else {}
    )
    agreements = tuple(Agreement(name, found[name], kept.get(name)) for name in compared)
    return Remeasured(artifact, agreements, {name: m for name, m in found.items() if name not in compared})
