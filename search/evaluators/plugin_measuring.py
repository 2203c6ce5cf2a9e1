"""The way of a plug-in's module to the latency benchmark: milliseconds per forward at the plug-in's batch shape."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from paretune.compression.export.graph import save_model
from paretune.objectives.latency.measurement_key import target_key, timed_pattern
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import FORWARD, forward_measurements
from paretune.search.evaluators.latency_measuring import LatencyMeasuring
from paretune.search.evaluators.plugin_workspace import PluginWorkspace
from paretune.spaces.module_candidate import ModuleCandidate


class PluginMeasuring(LatencyMeasuring):
    """Visits of a module take turns with the same reference as a decoder's: one forward stands where a decode step does."""

    latency = (FORWARD,)

    def __init__(self, space: PluginWorkspace) -> None:
        super().__init__(space)
        self.space = space

    def named(self, measurements: dict[str, Measurement]) -> dict[str, Measurement]:
        """Return the benchmark's measurements under a module's names: forward instead of decode."""
        return forward_measurements(measurements)

    def build(self, candidate: ModuleCandidate, model: Path) -> None:
        """Write the module's graph with the candidate's masks and formats."""
        weights, _ = self.space.sparsify(candidate)
        save_model(self.space.graph(candidate).fill(weights, self.space.forms(candidate)), model)

    def kept_file(self, candidate: ModuleCandidate) -> Path:
        """Return the path at which a candidate's latency is kept.

        Candidates share it if they differ only in weight values, or patterns without a kernel. A change of widths,
        formats, profile, engine or machine gives another path.
        """
        groups = tuple(replace(g, pattern=timed_pattern(g.pattern, self.space.profile)) for g in candidate.groups)
        return self._folder() / f"{ModuleCandidate(groups, candidate.widths).key}.json"

    def _folder(self) -> Path:
        space = self.space
        inputs = [(tuple(x.shape), str(x.dtype)) for x in space.batch.inputs]
        structure = hashlib.sha256(f"{space.teacher.digest}{inputs}".encode()).hexdigest()[:12]
        target = target_key(space.profile, space.fingerprint)
        return space.cache / "measurements" / target / f"plugin-{space.teacher.name}-{structure}"
