"""The latency benchmark that every kind of model shares: one benchmark per worker, kept latencies, the measuring for the fit."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

from paretune.common.errors import Infeasible
from paretune.common.files import read_kept, warn_damaged, write_atomically
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.agent.client import RemoteBenchmark
from paretune.objectives.agent.remote import open_benchmark, predicted_instead, remote_fingerprint
from paretune.objectives.agent.wire import AgentGone
from paretune.objectives.latency.benchmark import LatencyBenchmark, LatencyResult, Pair
from paretune.objectives.latency.reference import open_local_benchmark
from paretune.objectives.latency.workload import STANDARD, Workload
from paretune.objectives.measurement import Measurement
from paretune.search.tasks.base import Outcome
from paretune.search.tasks.fit import Fit, FitResult
from paretune.spaces.kinds import AnyCandidate, AnySpace, candidate_from_dict

SLICE_S = 10.0
ENOUGH_QUIET = 10


class Host(Protocol):
    """What a worker's workspace gives to the latency benchmark."""

    folder: Path
    home: Path
    cache: Path
    profile: Profile
    lock: MachineLock

    @property
    def space(self) -> AnySpace:
        """The study's space, whose `shape` predictions need."""


class LatencyMeasuring(ABC):
    """One latency benchmark per worker; every undisturbed latency is kept under what it depends on."""

    # The measurements that are kept and fitted.
    latency: ClassVar[tuple[str, ...]]

    def __init__(self, host: Host) -> None:
        self._host = host
        self._lane: LatencyBenchmark | RemoteBenchmark | None = None
        self._machine: str | None = None
        self._missing: list[AnyCandidate] | None = None
        self._rough: list[dict[str, Any]] = []
        self._refused: list[str] = []
        self._deadline = 0.0

    @abstractmethod
    def kept_file(self, candidate: Any) -> Path:
        """Where a candidate's latency is kept: the same for all that take the same time."""

    @abstractmethod
    def build(self, candidate: Any, model: Path) -> None:
        """Write a graph of the candidate with any weights: values do not change the time."""

    @property
    def turn(self) -> Workload:
        """What a candidate is timed with."""
        return STANDARD

    def fitted(self) -> None:  # noqa: B027 (nothing to let go of is usual)
        """Free what only `build` needs; called once the measuring for the fit has ended."""

    def named(self, measurements: dict[str, Measurement]) -> dict[str, Measurement]:
        """The latency benchmark's measurements as this kind of model calls them."""
        return measurements

    def benchmark(self) -> LatencyBenchmark | RemoteBenchmark:
        """The latency benchmark of this machine, or of the profile's agent."""
        if self._lane is None and self._host.profile.agent is not None:
            self._lane = open_benchmark(self._host.profile, self._host.home, turn=self.turn)
        elif self._lane is None:
            self._lane = open_local_benchmark(self._host.cache, self._host.profile, self._host.lock, self.turn)
        return self._lane

    def measure(
        self, candidate: AnyCandidate, model: Path, pair: Pair | RemoteBenchmark | None = None
    ) -> LatencyResult:
        """Several visits with fresh processes, or one with the children of `pair`.

        A confirmation whose agent stays away is left predicted, and not kept; the fit has nothing else, so there AgentGone is
        raised.
        """
        benchmark: Any = self.benchmark()
        kept_at = self._kept_at(self.kept_file(candidate))
        try:
            result = benchmark.measure(model) if pair is None else benchmark.quick(model, pair)
        except AgentGone as gone:
            if pair is not None:
                raise
            points = self.all_kept()
            shape = self._host.space.shape
            return LatencyResult(
                predicted_instead(self._host.profile, candidate, model, shape, points, self.latency, gone, self.turn),
                False,
            )
        result = LatencyResult(self.named(result.measurements), result.stable)
        if result.stable:
            found = {name: result.measurements[name].to_dict() for name in self.latency}
            kept = {"candidate": json.loads(candidate.to_json()), **found}
            write_atomically(kept_at, json.dumps(kept).encode())
        return result

    def fit(self, task: Fit) -> Outcome[FitResult]:
        """Measure designed candidates that no kept measurement covers, a slice of time per call, `seconds` in all.

        On a machine that is too busy the disturbed values serve the fit (and nothing else), which the outcome says.
        """
        if self._missing is None:
            self._missing = [c for c in task.designed if self._kept(self._kept_at(self.kept_file(c))) is None]
            self._rough, self._refused, self._deadline = (
                [],
                [],
                time.monotonic() + min(task.seconds, task.seconds_left),
            )
        start = time.monotonic()
        if self._missing:
            with self.benchmark().pair() as pair:
                while self._missing and time.monotonic() < min(start + SLICE_S, self._deadline):
                    candidate = self._missing.pop(0)
                    try:
                        self._measure_random(candidate, pair)
                    except Infeasible as error:
                        self._refused.append(str(error))
                        break  # its child may be gone: the next slice has fresh ones
        if self._missing and time.monotonic() < self._deadline:
            return Outcome(result=FitResult(missing=len(self._missing)), done=False)
        self.fitted()
        kept = self.all_kept()
        disturbed = self._rough if len(kept) < ENOUGH_QUIET else []
        skipped, self._missing = len(self._missing), None
        found = FitResult(tuple(kept + disturbed), skipped, len(disturbed), tuple(self._refused))
        return Outcome(result=found)

    def all_kept(self) -> list[dict[str, Any]]:
        """Everything kept for models like this one on this machine: {"candidate", and milliseconds by name}."""
        found = (self._kept(path) for path in sorted(self._kept_at(self._folder() / "any").parent.glob("*.json")))
        return [kept for kept in found if kept is not None]

    def _kept(self, path: Path) -> dict[str, Any] | None:
        """A kept measurement: {"candidate", and milliseconds by name}; None if it is not there or damaged."""
        found = read_kept(path)
        try:
            if found is None:
                return None
            candidate_from_dict(found["candidate"])
            return {"candidate": found["candidate"], **{name: float(found[name]["value"]) for name in self.latency}}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            warn_damaged(path, error)
            return None

    @abstractmethod
    def _folder(self) -> Path:
        """Where `kept_file` lies: one folder per machine, engine and kind of model."""

    def _kept_at(self, path: Path) -> Path:
        """`path`, or below it a folder for the agent's machine: what was measured there says nothing of this one."""
        if self._host.profile.agent is None:
            return path
        if self._machine is None:
            benchmark = self.benchmark()
            assert isinstance(benchmark, RemoteBenchmark)
            self._machine = remote_fingerprint(benchmark, self._host.folder)
        return path.parent / f"at-{self._machine}" / path.name

    def _measure_random(self, candidate: AnyCandidate, pair: Pair | RemoteBenchmark) -> None:
        model = self._host.folder / "work" / "fit.onnx"
        model.parent.mkdir(parents=True, exist_ok=True)
        self.build(candidate, model)
        result = self.measure(candidate, model, pair)
        if not result.stable:
            found = {name: result.measurements[name].value for name in self.latency}
            self._rough.append({"candidate": json.loads(candidate.to_json()), **found})
