"""A number that knows its unit, its interval and where it comes from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Provenance = Literal["measured", "predicted", "table", "disturbed"]
# How the note begins of what could not be measured because its machine was away.
LEFT_PREDICTED = "left predicted: "


@dataclass(frozen=True)
class Measurement:
    """`low` … `high` is the 95 % interval; `samples` how many observations it rests on; `note` what a reader must know.

    "measured" was observed on the machine of `fingerprint`; "predicted" comes from a fit or a model; "table" from published
    figures; "disturbed" was observed while something else used the machine and must not be relied on.
    """

    value: float
    unit: str
    low: float
    high: float
    provenance: Provenance
    samples: int = 1
    fingerprint: str = ""
    note: str = ""

    @property
    def is_left_predicted(self) -> bool:
        """Whether it is worth another try to measure it."""
        return self.provenance == "predicted" and self.note.startswith(LEFT_PREDICTED)

    def overlaps(self, other: Measurement) -> bool:
        """Whether the two intervals share a value."""
        return self.low <= other.high and other.low <= self.high

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, which knows no infinity: an infinite value or end of the interval is None."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """What `to_dict` gave."""
        values: dict[str, Any] = {key: math.inf if value is None else value for key, value in data.items()}
        return cls(**values)

    @classmethod
    def exact(cls, value: float, unit: str, note: str = "") -> Measurement:
        """A counted quantity without error, such as bytes."""
        return cls(value, unit, value, value, "measured", 1, "", note)
