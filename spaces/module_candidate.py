"""One point of the space of any torch module: a precision and a pattern per group of matrices, and the module's own widths.

What a plug-in's teacher brings is not known beforehand, so nothing here speaks of layers or heads: matrices (weights of
Linear and convolutions) come in named groups, and structural cuts are named axes with ordered choices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from paretune.spaces.candidate import DENSE, FP32, Format, Pattern, PatternKind

KIND = "module"
BITS = (4, 8, 32)


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices that share one precision and one pattern.

    `weights` is their number, `macs` their multiply-adds per forward at the plug-in's batch shape. `patterns` are those that
    fit at least one of them, `group_sizes` the groups along K that 4-bit weights can have (0: one scale per output channel).
    """

    name: str
    weights: int
    macs: float
    patterns: tuple[PatternKind, ...] = ("unstructured",)
    group_sizes: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class SliceAxis:
    """A width that can be cut: its choices ascending, the teacher's own last.

    `shares` holds for every choice the fraction of each group's MACs that is left when this axis alone is cut; fractions of
    several axes are multiplied, which is exact where each of them scales one side of a matrix.
    """

    name: str
    choices: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...] = ()

    def share(self, choice: int, group: int) -> float:
        """Return the fraction of the group's MACs that is left at `choice`; 1 where the shares are not known."""
        return self.shares[self.choices.index(choice)][group] if self.shares else 1.0


@dataclass(frozen=True)
class ModuleShape:
    """What a teacher module offers to the search. `parameters` counts all of them, also those in no group."""

    groups: tuple[MatrixGroup, ...]
    axes: tuple[SliceAxis, ...] = ()
    parameters: int = 0


@dataclass(frozen=True)
class GroupChoice:
    """What is done to one group of matrices."""

    name: str
    format: Format = FP32
    pattern: Pattern = DENSE


@dataclass(frozen=True)
class ModuleCandidate:
    """A sliced, sparse and quantized module. Equal canonical candidates have equal keys."""

    groups: tuple[GroupChoice, ...]
    widths: tuple[tuple[str, int], ...] = ()

    def canonical(self, shape: ModuleShape) -> ModuleCandidate:
        """Drop what has no effect on these groups, so that equal computations are equal candidates."""
        fits = {group.name: group for group in shape.groups}
        return ModuleCandidate(
            tuple(
                GroupChoice(g.name, _settle_format(g.format, fits[g.name]), _settle_pattern(g.pattern, fits[g.name]))
                for g in self.groups
            ),
            self.widths,
        )

    @cached_property
    def key(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def structure_key(self) -> str:
        """Key of what decides shapes: the widths."""
        return hashlib.sha256(json.dumps(self.widths).encode()).hexdigest()[:16]

    @property
    def stratum(self) -> str:
        """Pattern and smallest precision, the cells from which finalists are drawn: `dense/int4`, `2:4/int8`, …"""
        kinds = [g.pattern.kind for g in self.groups if g.pattern.kind != "none"]
        return f"{kinds[0] if kinds else 'dense'}/{min((g.format for g in self.groups), key=lambda f: f.bits).name}"

    @property
    def is_quantized(self) -> bool:
        """Whether any group of matrices is in another format than fp32."""
        return any(g.format.bits != 32 for g in self.groups)

    @property
    def is_sparse(self) -> bool:
        """Whether any group of matrices has a pattern of zeros."""
        return any(g.pattern.kind != "none" for g in self.groups)

    def is_full_size(self, shape: ModuleShape) -> bool:
        """Whether nothing is cut away, so that the teacher's own weights serve."""
        return all(dict(self.widths)[axis.name] == axis.choices[-1] for axis in shape.axes)

    def of(self, group: str) -> GroupChoice:
        """What is done to the group of that name."""
        return next(g for g in self.groups if g.name == group)

    def macs(self, shape: ModuleShape) -> list[float]:
        """Multiply-adds per forward of every group, after the cuts."""
        return [group.macs * self._left(shape, i) for i, group in enumerate(shape.groups)]

    def weights(self, shape: ModuleShape) -> list[float]:
        """Number of weights of every group after the cuts, by the fractions of the MACs."""
        return [group.weights * self._left(shape, i) for i, group in enumerate(shape.groups)]

    def _left(self, shape: ModuleShape, group: int) -> float:
        return math.prod(axis.share(dict(self.widths)[axis.name], group) for axis in shape.axes)

    def to_json(self) -> str:
        """Return the candidate as JSON with sorted keys; settings at their default are left out."""
        data = {
            "kind": KIND,
            "groups": {
                g.name: {
                    "format": {n: v for n, v in asdict(g.format).items() if v != getattr(FP32, n)},
                    "pattern": {n: v for n, v in asdict(g.pattern).items() if v != getattr(DENSE, n)},
                }
                for g in self.groups
            },
            "order": [g.name for g in self.groups],
            "widths": self.widths,
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModuleCandidate:
        """Inverse of `to_json`, from the parsed JSON."""
        groups = tuple(
            GroupChoice(name, Format(**data["groups"][name]["format"]), Pattern(**data["groups"][name]["pattern"]))
            for name in data["order"]
        )
        return cls(groups, tuple((str(name), int(width)) for name, width in data["widths"]))

    @property
    def name(self) -> str:
        """A short label: widths, precisions in the order of the groups, sparsity."""
        size = " ".join(f"{name} {width}" for name, width in self.widths)
        bits = "/".join(g.format.name for g in self.groups)
        sparse = next((f" {g.pattern.name}" for g in self.groups if g.pattern.kind != "none"), "")
        return f"{size} {bits}{sparse}".strip()

    def describe(self) -> str:
        """One line for people."""
        widths = ", ".join(f"{name} {width}" for name, width in self.widths)
        groups = ", ".join(f"{g.name} {_described(g.format)} {g.pattern.name}" for g in self.groups)
        return f"{widths}; {groups}" if widths else groups


def _described(form: Format) -> str:
    if form.bits == 32:
        return "fp32"
    return f"{form.name} per channel" if form.group_size == 0 else f"{form.name} in groups of {form.group_size}"


def _settle_format(form: Format, group: MatrixGroup) -> Format:
    """Weights only: what runs is float, so activations stay float; 8 bits have one scale per output channel."""
    if form.bits == 32:
        return FP32
    size = form.group_size if form.bits < 8 and form.group_size in group.group_sizes else 0
    return Format(form.bits, size)


def _settle_pattern(pattern: Pattern, group: MatrixGroup) -> Pattern:
    if pattern.kind not in group.patterns or pattern.ratio <= 0:
        return DENSE
    return replace(pattern, ratio=0.5) if pattern.kind == "2:4" else pattern
