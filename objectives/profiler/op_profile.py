"""What `paretune op-profile` found, as one value that terminal, JSON, picture and MLflow show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from paretune.objectives.measurement import Measurement
from paretune.objectives.profiler.op_costs import (
    PHASES,
    OpCost,
    Roof,
    Total,
    by_group,
    by_layer,
    by_op,
    by_place,
    totals,
)
from paretune.objectives.profiler.places import Findings, Place, best_places, findings_of

if TYPE_CHECKING:
    from paretune.objectives.profiler.torch_ops import TorchPhase

VIEWS: dict[str, Callable[[OpCost], str]] = {"ops": by_op, "groups": by_group, "layers": by_layer, "places": by_place}


@dataclass(frozen=True)
class Subject:
    """What was profiled. `digest` is that of a teacher's files or of an artifact's checksums."""

    name: str
    kind: Literal["teacher", "artifact"]
    digest: str
    description: str


@dataclass(frozen=True)
class OpProfile:
    """Everything that was found. `options` are all changes, `run_ms` whole runs while the engine profiled itself, by phase."""

    subject: Subject
    settings: dict[str, Any]
    measurements: dict[str, Measurement]
    roof: Roof
    costs: tuple[OpCost, ...]
    options: tuple[Place, ...]
    run_ms: dict[str, float]
    notes: tuple[str, ...] = ()
    torch: dict[str, TorchPhase] = field(default_factory=dict)

    def totals(self, phase: str, view: str) -> tuple[Total, ...]:
        """By op, matrix group, layer, or group of each layer; the longest first."""
        return totals(self.costs, self.roof, phase, VIEWS[view])

    @property
    def best(self) -> tuple[Place, ...]:
        """The five places where compression would pay most."""
        return best_places(self.options)

    @cached_property
    def findings(self) -> Findings:
        """What a search starts from, out of all `options`."""
        return findings_of(self.options)

    def plain_ms(self, phase: str) -> float:
        """Milliseconds of a run without the engine's profile."""
        return self.measurements["ttft_ms" if phase == "prefill" else "decode_ms_per_token"].value

    def between_ms(self, phase: str) -> float:
        """Milliseconds of a run that no op takes: the engine's own way from op to op. 0 where profiling itself, which slows
        ops of a few microseconds, takes more than that."""
        return max(0.0, self.plain_ms(phase) - sum(c.ms for c in self.costs if c.phase == phase))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data, with the totals of each phase in every view."""
        return {
            "subject": asdict(self.subject),
            "settings": self.settings,
            "measurements": {name: m.to_dict() for name, m in self.measurements.items()},
            "roof": asdict(self.roof),
            "best": [place.to_dict() for place in self.best],
            "options": [place.to_dict() for place in self.options],
            "findings": self.findings.to_dict(),
            "phases": {phase: self._phase(phase) for phase in PHASES},
            "nodes": [asdict(cost) for cost in self.costs],
            "torch": {phase: seen.to_dict() for phase, seen in self.torch.items()},
            "notes": list(self.notes),
        }

    def _phase(self, phase: str) -> dict[str, Any]:
        found: dict[str, Any] = {view: [t.to_dict() for t in self.totals(phase, view)] for view in VIEWS}
        times = {"plain_ms": self.plain_ms(phase), "profiled_ms": self.run_ms[phase]}
        return found | times | {"between_ms": self.between_ms(phase)}
