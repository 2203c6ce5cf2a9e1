"""The latency benchmark for a further target that is at hand: confirmed artifacts, under that target's engine and threads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from paretune.common.checksums import MODEL
from paretune.common.errors import EnvironmentProblem
from paretune.common.files import read_kept, warn_damaged
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.energy import following
from paretune.objectives.measurement import Measurement
from paretune.search.study.target_records import DECODE, TargetRow
from paretune.spaces.kinds import AnyCandidate


class Measurer(Protocol):
    """Takes the costs of one candidate on one target."""

    def kept(self, candidate: AnyCandidate) -> TargetRow | None:
        """What an earlier visit found; None if there was none."""

    def measure(self, candidate: AnyCandidate, artifact: Path) -> TargetRow | None:
        """A visit; None if it was disturbed. Raises Infeasible if the engine refuses, EnvironmentProblem if it is not there."""


@dataclass(frozen=True)
class _Host:
    """What the latency benchmark needs of a worker's workspace."""

    folder: Path
    cache: Path
    profile: Profile
    lock: MachineLock
    fingerprint: str
    teacher: Any


class TargetBenchmark:
    """Visits for one target; latencies are kept where those of searches are, so each serves the other."""

    def __init__(self, folder: Path, home: Path, profile: Profile, teacher: Any) -> None:
        from paretune.search.evaluators.measuring import Measuring  # late: it loads torch

        host = _Host(folder, home / "cache", profile, MachineLock(), fingerprint(), teacher)
        self._profile, self._visits = profile, Measuring(cast(Any, host))

    def kept(self, candidate: AnyCandidate) -> TargetRow | None:
        """Return what an earlier visit found; None if there was none, or its file is damaged."""
        path = self._visits.kept_file(cast(Any, candidate))
        found = read_kept(path)
        try:
            if found is None:
                return None
            return self._row({name: Measurement.from_dict(found[name]) for name in self._visits.latency})
        except (AttributeError, KeyError, TypeError) as error:
            warn_damaged(path, error)
            return None

    def measure(self, candidate: AnyCandidate, artifact: Path) -> TargetRow | None:
        """Measure the artifact; None if something disturbed it.

        Raises Infeasible if the engine refuses the model, EnvironmentProblem if the artifact or the engine is missing.
        """
        model = (artifact / MODEL).resolve()
        if not model.is_file():
            raise EnvironmentProblem(
                f"the artifact {artifact} is gone", "bring the study's artifacts back to measure them"
            )
        result = self._visits.measure(candidate, model)
        return self._row(result.measurements) if result.stable else None

    def _row(self, measurements: dict[str, Measurement]) -> TargetRow:
        return TargetRow({**following(measurements[DECODE], self._profile), **measurements})
