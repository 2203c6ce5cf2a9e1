"""A sweep over an artifact: how TTFT grows with the prompt, decode with context and batch, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.common.checksums import MODEL, check_artifact
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import load_profile
from paretune.objectives.artifacts.remeasure import context_of, require_at_hand
from paretune.objectives.latency.sweep import BATCHES, CONTEXTS, PROMPTS, SweepRow, is_quiet, sweep, sweep_points
from paretune.objectives.latency.workload import workload_within
from paretune.objectives.measurement import Measurement


@dataclass(frozen=True)
class Swept:
    """The rows of one artifact on one profile."""

    artifact: Path
    profile: str
    rows: tuple[SweepRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data; `measured` says whether no row was disturbed."""
        return {
            "artifact": str(self.artifact),
            "profile": self.profile,
            "measured": is_quiet(self.rows),
            "sweep": [row.to_dict() for row in self.rows],
        }

    def lines(self) -> list[str]:
        """A table: phase, tokens before, batch, milliseconds with their interval, tokens per second."""
        found = [f"{'':8}{'tokens':>7}{'batch':>7}{'ms':>11}  {'95 % interval':<24}{'tokens/s':>10}"]
        for row in self.rows:
            start = f"{row.point.phase:8}{row.point.length:>7}{row.point.batch:>7}"
            if row.time is None or row.rate is None:
                found.append(f"{start}  not run: {row.reason}")
                continue
            t = row.time
            interval = f"[{t.low:.3f} … {t.high:.3f}]"
            found.append(f"{start}{t.value:>11.3f}  {interval:<24}{row.rate.value:>10.0f}{_mark(t)}")
        return found

    def problem(self) -> EnvironmentProblem | None:
        """Why not all rows may be called measured; None if they may."""
        if is_quiet(self.rows):
            return None
        disturbed = sum(not is_quiet([row]) for row in self.rows)
        return EnvironmentProblem(
            f"{disturbed} of {len(self.rows)} points were disturbed by other work and are not measured",
            "end the other work on this machine and repeat",
        )


def sweep_artifact(
    artifact: Path,
    profile_name: str,
    home: Path,
    prompts: tuple[int, ...] | None = None,
    contexts: tuple[int, ...] | None = None,
    batches: tuple[int, ...] | None = None,
) -> Swept:
    """Sweep an artifact in the engine and with the threads of a profile; lengths beyond its context are left out.

    Raises UsageError for a damaged artifact, a plug-in's module, a profile of another machine, or when no length fits;
    Infeasible if the engine refuses the model.
    """
    from paretune.objectives.latency.reference import open_local_benchmark

    if check_artifact(artifact).get("kind") == "module":
        raise UsageError(f"a sweep is over prompts, but {artifact} is a module of a plug-in", "leave --sweep out")
    context = context_of(artifact)
    profile = load_profile(profile_name, home)
    require_at_hand(profile)
    points = sweep_points(context, prompts or PROMPTS, contexts or CONTEXTS, batches or BATCHES)
    if not points:
        raise UsageError(f"no prompt or context fits into the model's {context} tokens", "name shorter ones")
    benchmark = open_local_benchmark(home / "cache", profile, MachineLock(), workload_within(context))
    return Swept(artifact, profile.name, tuple(sweep(benchmark, (artifact / MODEL).resolve(), points)))


def _mark(m: Measurement) -> str:
    return "" if m.provenance == "measured" else f"  ({m.provenance})"
