"""Where compression would pay: what a decode step saves if a matrix group had fewer bits, or if a layer were dropped.

Predicted from measured times: an op with fewer bytes of weights has a lower roof. Either it stays as far above its roof as
it is (it takes the same share of it), or only the roof's own difference is saved; the truth lies between, and so does the
interval. Where arithmetic is the bound, the kernels of weights in blocks have been seen no faster than fp32 ones
(docs/log.md), so there no gain is likely, and the interval ends at what the integer peak would allow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from paretune.objectives.measurement import Measurement
from paretune.objectives.profiler.op_costs import MATRIX_GROUPS, PHASES, OpCost, Roof
from paretune.spaces.candidate import Format

MOST_PLACES = 5
DROPPED, NARROWED = "dropped", "a quarter narrower"
NARROWER = 0.25
# Milliseconds saved: least, likely, most.
Ends = tuple[float, float, float]


@dataclass(frozen=True)
class Place:
    """One change and what it saves per decode step, per prefill, and in bytes that a decode step reads.

    `ties` are layers that save as much, as far as can be told.
    """

    what: str
    change: str
    decode_ms: Measurement
    ttft_ms: Measurement
    read_bytes: float
    ties: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """`ffn to int4`, `ffn a quarter narrower`, `layer 3 dropped`, `one of 6 layers dropped`."""
        if self.change == DROPPED:
            return f"one of {len(self.ties) + 1} layers dropped" if self.ties else f"{self.what} {DROPPED}"
        return f"{self.what} {self.change}" if self.change == NARROWED else f"{self.what} to {self.change}"

    def to_dict(self) -> dict[str, Any]:
        """Return the place as a dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Findings:
    """What a search starts from: the milliseconds per decode step that each change saves, the most first.

    `groups` have a place per matrix group in its cheapest format; `layers` one per layer, by its number in the teacher. Changes
    that save nothing are left out.
    """

    groups: tuple[tuple[str, float], ...]
    layers: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        known = {name for name, _ in self.groups} <= set(MATRIX_GROUPS)
        saved = [ms for _, ms in (*self.groups, *self.layers)]
        if not known or not all(math.isfinite(ms) and ms > 0 for ms in saved):
            raise ValueError(
                f"findings name groups of {', '.join(MATRIX_GROUPS)} and milliseconds above 0, but got "
                f"{self.groups} and {self.layers}"
            )

    @property
    def cuts_first(self) -> bool:
        """Whether a dropped layer saves more than any group with fewer bits."""
        return bool(self.layers) and (not self.groups or self.layers[0][1] > self.groups[0][1])

    @property
    def text(self) -> str:
        """For a study's notes."""
        groups = ", ".join(f"{name} ({ms:.3f} ms)" for name, ms in self.groups) or "no group"
        layer = f"; a dropped layer saves up to {self.layers[0][1]:.3f} ms" if self.layers else ""
        return f"quantized first: {groups}{layer}"

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as a dictionary; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Findings:
        """Raises KeyError, TypeError or ValueError if the data are no findings."""
        return cls(
            tuple((str(name), float(ms)) for name, ms in data["groups"]),
            tuple((int(layer), float(ms)) for layer, ms in data["layers"]),
        )


def options(
    costs: Sequence[OpCost], roof: Roof, formats: Sequence[Format], slowdown: Mapping[str, float]
) -> tuple[Place, ...]:
    """Every group in each of the `formats` that has fewer bits than its own, a narrower FFN, and every layer dropped.

    `slowdown` is how much longer the ops took while they were profiled, by phase: intervals allow for it.
    """
    found = [
        _quantized(group, [c for c in costs if c.group == group and c.matrix is not None], form, roof, slowdown)
        for group in MATRIX_GROUPS
        for form in formats
    ]
    ffn = [c for c in costs if c.group == "ffn" and not c.name.endswith("layernorm")]
    found.append(_without("ffn", NARROWED, ffn, NARROWER, slowdown))
    for layer in sorted({c.layer for c in costs if c.layer is not None}):
        found.append(_without(f"layer {layer}", DROPPED, [c for c in costs if c.layer == layer], 1.0, slowdown))
    return tuple(place for place in found if place is not None)


def best_places(places: Sequence[Place], most: int = MOST_PLACES) -> tuple[Place, ...]:
    """The places that save most per decode step, each with its best change; fewer where fewer save anything.

    Layers are one place as long as their intervals share a value with the first one's: noise alone tells them apart.
    """
    best: dict[tuple[str, bool], Place] = {}
    for place in places:
        key = (place.what, place.change == NARROWED)
        if place.decode_ms.value > max(0.0, best[key].decode_ms.value if key in best else 0.0):
            best[key] = place
    found: list[Place] = []
    for place in sorted(best.values(), key=lambda p: (-p.decode_ms.value, p.text)):
        first = next((i for i, p in enumerate(found) if p.change == place.change == DROPPED), None)
        if first is not None and found[first].decode_ms.overlaps(place.decode_ms):
            found[first] = replace(found[first], ties=(*found[first].ties, place.what))
        else:
            found.append(place)
    return tuple(found[:most])


def findings_of(places: Sequence[Place]) -> Findings:
    """What a search starts from."""
    formats = [p for p in places if p.change not in (DROPPED, NARROWED)]
    groups = tuple((p.what, p.decode_ms.value) for p in best_places(formats, len(formats)))
    dropped = sorted((p for p in places if p.change == DROPPED), key=lambda p: -p.decode_ms.value)
    return Findings(groups, tuple((_number(p.what), p.decode_ms.value) for p in dropped if p.decode_ms.value > 0))


def _number(what: str) -> int:
    return int(what.removeprefix("layer "))


def _quantized(
    group: str, costs: Sequence[OpCost], form: Format, roof: Roof, slowdown: Mapping[str, float]
) -> Place | None:
    """None where no op of the group would have fewer bits."""
    changed = [c for c in costs if c.form.bits > form.bits]
    if not changed:
        return None
    note = "roofline from measured op times; ends of the interval: the same share of the roof, or the roofs' difference"
    decode, ttft = (
        _sum([_saving(c, form, roof) for c in changed if c.phase == phase], slowdown, phase, note)
        for phase in reversed(PHASES)
    )
    read = sum(c.weight_bytes(c.form) - c.weight_bytes(form) for c in changed if c.phase == "decode")
    return Place(group, form.label, decode, ttft, read)


def _without(what: str, change: str, costs: Sequence[OpCost], part: float, slowdown: Mapping[str, float]) -> Place:
    """Saves `part` of the ops' time and bytes."""
    note = "measured op times" if part == 1 else f"{part:.0%} of measured op times"
    decode, ttft = (
        _sum([(part * c.ms,) * 3 for c in costs if c.phase == phase], slowdown, phase, note)
        for phase in reversed(PHASES)
    )
    return Place(what, change, decode, ttft, part * sum(c.bytes for c in costs if c.phase == "decode"))


def _saving(cost: OpCost, form: Format, roof: Roof) -> Ends:
    """What one op saves with weights in `form`."""
    read = cost.bytes - cost.weight_bytes(cost.form) + cost.weight_bytes(form)
    now, then = roof.ms(cost.flops, cost.bytes, cost.form), roof.ms(cost.flops, read, form)
    if not now:
        return 0.0, 0.0, 0.0
    ends = (cost.ms * (1 - then / now), min(now - then, cost.ms))
    if roof.bound(cost.flops, cost.bytes, cost.form) == "compute":
        return min(0.0, ends[0]), min(0.0, ends[0]), max(0.0, ends[0])
    return min(ends), sum(ends) / 2, max(ends)


def _sum(savings: Sequence[Ends], slowdown: Mapping[str, float], phase: str, note: str) -> Measurement:
    """All ops of a change together; its interval is widened by what profiling itself cost."""
    least, likely, most = (sum(ends) for ends in zip(*savings, strict=True)) if savings else (0.0, 0.0, 0.0)
    factor = max(1.0, slowdown.get(phase, 1.0))
    low, high = min(least, least / factor), max(most, most / factor)
    return Measurement((likely + likely / factor) / 2, "ms", low, high, "predicted", len(savings), "", note)
