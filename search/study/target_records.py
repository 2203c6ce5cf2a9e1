"""What one candidate costs on a further target, and how a study keeps that.

Kept in the study's `meta` table: `targets` lists the names in the order of their addition, `target:<name>` holds one target
with all its rows as JSON. A table of its own would need a new schema version, and with it studies that older versions
refuse; rows are few (confirmed candidates only) and always read together. Studies without these entries have no targets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from paretune.objectives.measurement import Measurement
from paretune.search.study.records import now

NAMES = "targets"  # the meta entry that lists them
DECODE = "decode_ms_per_token"  # the latency of decoders; plug-ins have no further targets


class Meta(Protocol):
    """The part of a store that is needed here."""

    def meta(self, name: str, default: Any = None) -> Any:
        """Return the value of one of the study's settings, `default` if it is not set."""

    def set_meta(self, **values: Any) -> None:
        """Write or replace settings of the study in one transaction."""


@dataclass(frozen=True)
class TargetRow:
    """Costs of one candidate on one target. `infeasible` says why it cannot run there; empty where it can."""

    measurements: dict[str, Measurement] = field(default_factory=dict)
    infeasible: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether the latency benchmark took its latency; what the latency benchmark does not take stays predicted beside it."""
        return DECODE in self.measurements and self.measurements[DECODE].provenance == "measured"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON-able data; `from_dict` reads it back."""
        return {"measurements": {n: m.to_dict() for n, m in self.measurements.items()}, "infeasible": self.infeasible}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TargetRow:
        """Return the row of a parsed JSON object. Raises KeyError if a part is missing."""
        return cls({n: Measurement.from_dict(m) for n, m in data["measurements"].items()}, data["infeasible"])


@dataclass(frozen=True)
class Target:
    """A further target of a study: the profile as it was, rows by candidate key, and what a reader must know (`notes`).

    `machine` is the fingerprint of the machine that measured; `seconds` is the wall time that its rows took, over all calls.
    A candidate without a row has no known cost there.
    """

    name: str
    profile: dict[str, Any]
    rows: dict[str, TargetRow] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    at: str = field(default_factory=now)
    machine: str = ""

    @property
    def measured(self) -> int:
        """Number of candidates whose latency was measured here."""
        return sum(row.is_measured for row in self.rows.values())

    @property
    def infeasible(self) -> dict[str, str]:
        """Reasons by key."""
        return {key: row.infeasible for key, row in self.rows.items() if row.infeasible}

    def to_dict(self) -> dict[str, Any]:
        """Return the target with all its rows as JSON-able data; `from_dict` reads it back."""
        return {**asdict(self), "rows": {key: row.to_dict() for key, row in self.rows.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Target:
        """Return the target of a parsed JSON object. Raises KeyError if a part is missing."""
        rows = {key: TargetRow.from_dict(row) for key, row in data["rows"].items()}
        return cls(
            data["name"], data["profile"], rows, tuple(data["notes"]), data["seconds"], data["at"], data["machine"]
        )


def load_targets(store: Meta) -> tuple[Target, ...]:
    """The further targets of a study, in the order of their addition."""
    return tuple(Target.from_dict(store.meta(_entry(name))) for name in store.meta(NAMES, []))


def keep_targets(store: Meta, targets: Iterable[Target]) -> None:
    """Write or replace targets, in one transaction."""
    found = list(targets)
    names = list(dict.fromkeys([*store.meta(NAMES, []), *(t.name for t in found)]))
    store.set_meta(targets=names, **{_entry(t.name): t.to_dict() for t in found})


def _entry(name: str) -> str:
    return f"target:{name}"
