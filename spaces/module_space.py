"""The space of a plug-in's module as a sampler sees it: one integer per width, per group's bits and per group's sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from paretune.spaces.candidate import DENSE, FP32, Format, Pattern, PatternKind, Score
from paretune.spaces.module_candidate import BITS, GroupChoice, ModuleCandidate, ModuleShape

RATIOS = (0.3, 0.5, 0.7)
SCORES: tuple[Score, ...] = ("magnitude", "wanda")
Distribution = tuple[str, Any]


@dataclass(frozen=True)
class ModuleSpace:
    """All candidates of a module with the weight precisions `bits` (ascending; 32 is always one of them).

    Pattern, score and group size are chosen once for all groups; how much of a group goes, and its bits, per group.
    """

    shape: ModuleShape
    bits: tuple[int, ...] = BITS
    mild: ClassVar[bool] = False
    # There is no elastic student: sizes are slices of the teacher, repaired by recovery.
    has_elastic: ClassVar[bool] = False

    @classmethod
    def of(cls, shape: ModuleShape, kernels: tuple[str, ...]) -> ModuleSpace:
        """Return the space of the weight precisions that `kernels` name. Activations stay float, whatever they name."""
        names = {kernel.split("/")[0] for kernel in kernels} | {"fp32"}
        return cls(shape, tuple(b for b in BITS if ("fp32" if b == 32 else f"int{b}") in names))

    @property
    def patterns(self) -> tuple[PatternKind, ...]:
        """Patterns that fit some group, in a fixed order."""
        found = {kind for group in self.shape.groups for kind in group.patterns}
        return tuple(kind for kind in ("2:4", "unstructured", "block") if kind in found)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Ascending; 0 (per output channel) comes last, because it is the coarsest."""
        found = {size for group in self.shape.groups for size in group.group_sizes}
        return (*sorted(found - {0}), *((0,) if 0 in found else ()))

    def distributions(self) -> dict[str, Distribution]:
        """Sampler variables: name to ("int", (low, high)) or ("categorical", choices)."""
        found: dict[str, Distribution] = {
            f"width.{axis.name}": ("int", (0, len(axis.choices) - 1)) for axis in self.shape.axes
        }
        for group in self.shape.groups:
            found[f"bits.{group.name}"] = ("int", (0, len(self.bits) - 1))
            found[f"sparsity.{group.name}"] = ("int", (0, len(RATIOS)))
        found["pattern"] = ("categorical", self.patterns)
        found["score"] = ("categorical", SCORES)
        if 4 in self.bits and len(self.group_sizes) > 1:
            found["group_size"] = ("int", (0, len(self.group_sizes) - 1))
        return found

    def decode(self, params: Mapping[str, Any]) -> ModuleCandidate:
        """The canonical candidate of a sampler's parameters; the pattern "none" means dense whatever the sparsities say."""
        size = self.group_sizes[params.get("group_size", 0)]
        groups = []
        for group in self.shape.groups:
            level = params[f"sparsity.{group.name}"] if params["pattern"] != "none" else 0
            pattern = Pattern(params["pattern"], RATIOS[level - 1], params["score"]) if level else DENSE
            groups.append(GroupChoice(group.name, _format(self.bits[params[f"bits.{group.name}"]], size), pattern))
        widths = tuple((axis.name, axis.choices[params[f"width.{axis.name}"]]) for axis in self.shape.axes)
        return ModuleCandidate(tuple(groups), widths).canonical(self.shape)

    def encode(self, candidate: ModuleCandidate) -> dict[str, Any]:
        """Sampler parameters; `decode(encode(c)) == c`. Raises ValueError if the candidate lies outside this space."""
        widths = dict(candidate.widths)
        sparse = next((g.pattern for g in candidate.groups if g.pattern.kind != "none"), None)
        size = next((g.format.group_size for g in candidate.groups if g.format.bits == 4 and g.format.group_size), None)
        params: dict[str, Any] = {
            f"width.{a.name}": a.choices.index(widths.get(a.name, a.choices[-1])) for a in self.shape.axes
        }
        for choice in candidate.groups:
            params[f"bits.{choice.name}"] = self.bits.index(choice.format.bits)
            ratio = choice.pattern.ratio
            params[f"sparsity.{choice.name}"] = 1 + RATIOS.index(ratio) if choice.pattern.kind != "none" else 0
        params["pattern"] = self.patterns[0] if sparse is None else sparse.kind
        params["score"] = SCORES[0] if sparse is None else sparse.score
        if "group_size" in self.distributions():
            coarsest = len(self.group_sizes) - 1
            params["group_size"] = coarsest if size is None else self.group_sizes.index(size)
        if self.decode(params) != candidate:
            raise ValueError(f"the candidate lies outside this space: {candidate.describe()}")
        return params

    def baselines(self) -> list[ModuleCandidate]:
        """The unmodified teacher at fp32, int8 and int4 (those the profile executes)."""
        return [self._uniform(bits) for bits in reversed(self.bits)]

    def seeds(self) -> list[ModuleCandidate]:
        """Textbook candidates that every search should have seen: each width cut alone, and half of all weights gone."""
        middle = {a.name: a.choices[len(a.choices) // 2] for a in self.shape.axes if len(a.choices) > 1}
        found = [self._uniform(bits, {name: width}) for name, width in middle.items() for bits in self.bits[1:]]
        for kind in self.patterns[:2]:
            found.append(self._uniform(8 if 8 in self.bits else 32, {}, Pattern(kind, 0.5)))
        return list(dict.fromkeys(found))

    def size(self) -> int:
        """Number of distinct candidates at most: some patterns and group sizes change nothing in some groups."""
        total = 1
        for axis in self.shape.axes:
            total *= len(axis.choices)
        dense = sparse = 1
        for _ in self.shape.groups:
            dense *= len(self.bits)
            sparse *= len(self.bits) * (1 + len(RATIOS))
        return total * (dense + (sparse - dense) * len(self.patterns) * len(SCORES)) * len(self.group_sizes)

    def _uniform(self, bits: int, widths: Mapping[str, int] | None = None, pattern: Pattern = DENSE) -> ModuleCandidate:
        form = _format(bits, self.group_sizes[0])
        groups = tuple(GroupChoice(group.name, form, pattern) for group in self.shape.groups)
        sizes = tuple((a.name, (widths or {}).get(a.name, a.choices[-1])) for a in self.shape.axes)
        return ModuleCandidate(groups, sizes).canonical(self.shape)


def _format(bits: int, group_size: int) -> Format:
    return FP32 if bits == 32 else Format(8 if bits == 8 else 4, group_size)
