"""The way of a plug-in's module to the lane: milliseconds per forward at the plug-in's batch shape."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from paretune.compression.export.graph import save_model
from paretune.hardware_profiles.files import write_atomically
from paretune.objectives.lane import LaneResult, Pair
from paretune.objectives.measurement import Measurement
from paretune.objectives.module_quality import LATENCY
from paretune.search.measuring import Measuring
from paretune.search.plugin_workspace import PluginWorkspace
from paretune.spaces.candidate import DENSE
from paretune.spaces.module_candidate import ModuleCandidate

RENAMED = {"decode_ms_per_token": LATENCY, "decode_p90_ms": "forward_p90_ms"}
LEFT_OUT = ("ttft_ms",)


class PluginMeasuring(Measuring):
    """Visits of a module take turns with the same reference as a decoder's: one forward stands where a decode step does."""

    latency = (LATENCY,)

    def __init__(self, space: PluginWorkspace) -> None:
        super().__init__(space)
        self.plugin_space = space

    def measure(self, candidate: Any, model: Path, pair: Pair | None = None) -> LaneResult:
        """Several visits with fresh processes, or one with the children of `pair`."""
        result = self.lane().measure(model) if pair is None else self.lane().quick(model, pair)
        found = forward_measurements(result.measurements)
        if result.stable:
            kept = {"candidate": json.loads(candidate.to_json()), LATENCY: found[LATENCY].to_dict()}
            write_atomically(self.kept_file(candidate), json.dumps(kept).encode())
        return LaneResult(found, result.stable)

    def _build(self, candidate: Any, model: Path) -> None:
        """A graph with the teacher's own weights: values do not change the time."""
        weights, _ = self.plugin_space.sparsify(candidate)
        save_model(self.plugin_space.graph(candidate).fill(weights, self.plugin_space.forms(candidate)), model)

    def kept_file(self, candidate: Any) -> Path:
        """Where a candidate's latency is kept: other weight values and patterns hit, other widths, formats, machines miss."""
        assert isinstance(candidate, ModuleCandidate)
        plain = ModuleCandidate(tuple(replace(g, pattern=DENSE) for g in candidate.groups), candidate.widths)
        return self._folder() / f"{plain.key}.json"

    def _folder(self) -> Path:
        space, p = self.plugin_space, self.plugin_space.profile
        engine = f"{space.fingerprint}-{p.engine}-{p.engine_version}-t{p.threads}"
        inputs = [(tuple(x.shape), str(x.dtype)) for x in space.batch.inputs]
        structure = hashlib.sha256(f"{space.teacher.digest}{inputs}".encode()).hexdigest()[:12]
        return space.cache / "measurements" / engine / f"plugin-{space.teacher.name}-{structure}"


def forward_measurements(measurements: dict[str, Measurement]) -> dict[str, Measurement]:
    """The lane's measurements under a module's names: what it calls a decode step was one forward."""
    return {
        RENAMED.get(name, name): replace(m, unit="ms") if name in RENAMED else m
        for name, m in measurements.items()
        if name not in LEFT_OUT
    }
