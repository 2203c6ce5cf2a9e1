"""The space a sampler sees: a few ordered integers and categories, decoded into layer-uniform candidates.

Ordered choices (depth, widths, bits, group size, ratio) are integers, because every Optuna sampler treats categories as
unordered. What the profile has no kernel for is left out of the choices, so it is never proposed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from paretune.spaces.candidate import (
    DENSE,
    FP32,
    Activation,
    Algorithm,
    Candidate,
    Format,
    Layer,
    Pattern,
    PatternKind,
    Score,
    Shape,
    group_for,
)

GROUP_SIZES = (32, 64, 128)
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7)
PATTERNS: tuple[PatternKind, ...] = ("none", "2:4", "unstructured", "threshold", "block")
SCORES: tuple[Score, ...] = ("magnitude", "wanda", "sparsegpt")
QUANTIZERS: tuple[Algorithm, ...] = ("rtn", "gptq")
# Layers times the cube of the widest input: beyond this (about 200M parameters) GPTQ and SparseGPT take longer than all the
# rest of a rung-0 evaluation may.
MOST_SECOND_ORDER = 3e11
WIDTH_LEVELS = 12
WIDTH_STEP = 64

Distribution = tuple[str, Any]


@dataclass(frozen=True)
class Space:
    """All layer-uniform candidates of a teacher's `shape` that the kernels in `kernels` (`int4/int8` …) execute.

    `min_depth`, `min_ffn`, `min_kv_groups` bound the student from below; a teacher that cannot be retrained gets mild cuts.
    `min_hidden` bounds the residual stream, 0 leaves it alone. With `given` the teacher came with masks that can be kept.
    `extra_ffn` are widths beside the usual ones.
    """

    shape: Shape
    kernels: tuple[str, ...]
    min_depth: int
    min_ffn: int
    min_kv_groups: int
    mild: bool = False
    second_order: bool = True
    min_hidden: int = 0
    given: bool = False
    extra_ffn: tuple[int, ...] = ()
    # Sizes below the teacher's come from an elastic student.
    has_elastic: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        shape: Shape,
        kernels: tuple[str, ...],
        mild: bool = False,
        second_order: bool = True,
        hidden: bool = False,
        given: bool = False,
    ) -> Space:
        """The default space: down to a third of the depth and a quarter of the widths (`mild`: three quarters of each).

        `second_order` has GPTQ and SparseGPT in it, for teachers that are small enough; `hidden` has residual widths down to half
        the teacher's (`mild`: three quarters).
        """
        narrowest = _align((3 * shape.hidden // 4) if mild else shape.hidden // 2) if hidden and shape.gated else 0
        if mild:
            return cls(
                shape,
                kernels,
                max(1, -(-3 * shape.layers // 4)),
                _align(3 * shape.ffn // 4),
                max(1, -(-3 * shape.kv_heads // 4)),
                mild,
                second_order,
                narrowest,
                given,
            )
        return cls(
            shape,
            kernels,
            max(min(2, shape.layers), shape.layers // 3),
            _align(shape.ffn // 4),
            max(1, shape.kv_heads // 4),
            second_order=second_order,
            min_hidden=narrowest,
            given=given,
        )

    @property
    def ffn_widths(self) -> tuple[int, ...]:
        """Ascending FFN widths, multiples of 64 (32 for small teachers), at most 12 of them and the extra ones; the teacher's own
        is the last."""
        return tuple(sorted({*_widths(self.min_ffn, self.shape.ffn), *self.extra_ffn}))

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Widths of the residual stream like those of the FFN; only the teacher's own unless they are searched."""
        return _widths(self.min_hidden, self.shape.hidden) if self.min_hidden else (self.shape.hidden,)

    @property
    def bits(self) -> tuple[int, ...]:
        """Weight bits with a kernel, coarse to fine: a subset of (4, 8, 32)."""
        names = {kernel.split("/")[0] for kernel in self.kernels}
        return tuple(b for b, name in ((4, "int4"), (8, "int8"), (32, "fp32")) if name in names)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Ascending group sizes that divide the hidden width; a narrow or odd one has fewer than `GROUP_SIZES`."""
        return tuple(sorted({group_for(size, self.shape.hidden) for size in GROUP_SIZES}))

    @property
    def has_second_order(self) -> bool:
        """Whether the teacher is small enough for GPTQ and SparseGPT, whose cost grows with the cube of a matrix's inputs."""
        return (
            self.second_order and self.shape.layers * max(self.shape.hidden, self.shape.ffn) ** 3 <= MOST_SECOND_ORDER
        )

    @property
    def scores(self) -> tuple[Score, ...]:
        return SCORES if self.has_second_order else tuple(s for s in SCORES if s != "sparsegpt")

    @property
    def quantizers(self) -> tuple[Algorithm, ...]:
        """What can find the codes of a 4-bit matrix."""
        return QUANTIZERS if self.has_second_order else ("rtn",)

    def distributions(self) -> dict[str, Distribution]:
        """Sampler variables: name to ("int", (low, high)) or ("categorical", choices)."""
        top = len(self.bits) - 1
        patterns: tuple[PatternKind, ...] = (*PATTERNS, "given") if self.given else PATTERNS
        found: dict[str, Distribution] = {
            "depth": ("int", (self.min_depth, self.shape.layers)),
            "ffn": ("int", (0, len(self.ffn_widths) - 1)),
            "kv_groups": ("int", (self.min_kv_groups, self.shape.kv_heads)),
            "pattern": ("categorical", patterns),
            "ratio": ("int", (0, len(RATIOS) - 1)),
            "score": ("categorical", self.scores),
            "attention_bits": ("int", (0, top)),
            "ffn_bits": ("int", (0, top)),
            "head_bits": ("int", (0, top)),
            "embedding_bits": ("int", (0, top)),
            "group_size": ("int", (0, len(self.group_sizes) - 1)),
        }
        if {"int4/int8", "int4/fp32"} <= set(self.kernels):
            found["int4_activation"] = ("categorical", ("int8", "fp32"))
        if 4 in self.bits and len(self.quantizers) > 1:
            found["quantizer"] = ("categorical", self.quantizers)
        if len(self.hidden_widths) > 1:  # steps below the teacher's width, so that 0 is what studies without it did
            found["hidden"] = ("int", (0, len(self.hidden_widths) - 1))
        return found

    def decode(self, params: Mapping[str, Any]) -> Candidate:
        """The canonical candidate of a sampler's parameters."""
        group = self.group_sizes[params["group_size"]]
        wanted, quantizer = params.get("int4_activation", "int8"), params.get("quantizer", "rtn")
        attention, ffn, head, embedding = (
            self.format(self.bits[params[f"{name}_bits"]], group, wanted, quantizer)
            for name in ("attention", "ffn", "head", "embedding")
        )
        layer = Layer(
            self.ffn_widths[params["ffn"]],
            params["kv_groups"],
            attention,
            ffn,
            Pattern(params["pattern"], 0.5 if params["pattern"] == "2:4" else RATIOS[params["ratio"]], params["score"]),
        )
        hidden = self.hidden_widths[-1 - params.get("hidden", 0)]
        return Candidate((layer,) * params["depth"], head, embedding, hidden).canonical(self.shape)

    def encode(self, candidate: Candidate) -> dict[str, Any]:
        """Sampler parameters of a layer-uniform candidate; `decode(encode(c)) == c`. Raises ValueError if it has none."""
        x = candidate.layers[0]
        if any(layer != x for layer in candidate.layers):
            raise ValueError("only layer-uniform candidates have sampler parameters")
        formats = (x.attention_format, x.ffn_format, candidate.head_format, candidate.embedding_format)
        group = max((f.group_size for f in formats if f.bits != 32), default=self.group_sizes[0])
        attention, ffn, head, embedding = (self.bits.index(f.bits) for f in formats)
        params: dict[str, Any] = {
            "depth": len(candidate.layers),
            "ffn": self.ffn_widths.index(x.ffn),
            "kv_groups": x.kv_groups,
            "pattern": x.pattern.kind,
            "ratio": RATIOS.index(x.pattern.ratio) if x.pattern.ratio in RATIOS and x.pattern.kind != "2:4" else 0,
            "score": x.pattern.score,
            "attention_bits": attention,
            "ffn_bits": ffn,
            "head_bits": head,
            "embedding_bits": embedding,
            "group_size": self.group_sizes.index(group),
        }
        if "int4_activation" in self.distributions():
            params["int4_activation"] = next((f.activation for f in formats[:3] if f.bits == 4), "int8")
        if "quantizer" in self.distributions():
            params["quantizer"] = "gptq" if candidate.uses_gptq else "rtn"
        if "hidden" in self.distributions():
            widths = self.hidden_widths
            params["hidden"] = len(widths) - 1 - widths.index(candidate.width(self.shape))
        if self.decode(params) != candidate:
            raise ValueError(f"the candidate lies outside this space: {candidate.describe()}")
        return params

    def format(
        self, bits: int, group_size: int = 32, int4_activation: str = "int8", quantizer: Algorithm = "rtn"
    ) -> Format:
        """The format of `bits` with the activations its kernel takes (int8 weights run with int8 activations only).

        `quantizer` is for 4-bit weights; int8 is always rounded to nearest, where GPTQ has next to nothing to repair.
        """
        if bits == 32:
            return FP32
        wanted: Activation = "fp32" if bits == 4 and int4_activation == "fp32" else "int8"
        kernels = [k for k in self.kernels if k.startswith(f"int{bits}/")]
        activation: Activation = (
            wanted if f"int{bits}/{wanted}" in kernels else ("int8" if f"int{bits}/int8" in kernels else "fp32")
        )
        return Format(8, group_size, activation) if bits == 8 else Format(4, group_size, activation, quantizer)

    def baselines(self) -> list[Candidate]:
        """The unmodified teacher at fp32, int8 and int4 (those the profile executes), groups of 32."""
        found = []
        for bits in reversed(self.bits):
            form = self.format(bits)
            layer = Layer(self.shape.ffn, self.shape.kv_heads, form, form, DENSE)
            found.append(Candidate((layer,) * self.shape.layers, form, form).canonical(self.shape))
        return found

    def size(self) -> int:
        """Number of distinct candidates, counted over canonical ones."""
        ratios = len(self.scores) * len(RATIOS)
        patterns = 1 + len(self.scores) + (len(PATTERNS) - 2) * ratios + int(self.given)
        sizes = (
            (self.shape.layers - self.min_depth + 1)
            * len(self.ffn_widths)
            * (self.shape.kv_heads - self.min_kv_groups + 1)
        )
        return sizes * patterns * sum(self._precisions(hidden) for hidden in self.hidden_widths)

    def _precisions(self, hidden: int) -> int:
        """Number of distinct precisions of a student of that width."""
        groups = len({group_for(size, hidden) for size in self.group_sizes})
        activations, precisions = 2 if "int4_activation" in self.distributions() else 1, 0
        for combination in itertools.product(self.bits, repeat=4):
            quantized = any(b != 32 for b in combination)
            shared = self.shape.tied and combination[2] == combination[3]
            calibrated = 4 in (combination[:2] if shared else combination[:3])
            variants = (groups if quantized else 1) * (len(self.quantizers) if calibrated else 1)
            precisions += variants * (activations if 4 in combination[:3] else 1)
        return precisions

    def smallest(self) -> tuple[int, int, int]:
        """(depth, FFN width, KV groups) of the smallest student."""
        return self.min_depth, self.ffn_widths[0], self.min_kv_groups


def _widths(least: int, own: int) -> tuple[int, ...]:
    """Ascending multiples of 64 (32 where `own` is below 256) from `least`, at most 12 with the teacher's own at the end."""
    step = WIDTH_STEP if own >= 4 * WIDTH_STEP else 32
    inner = [w for w in range(least, own, step) if w % step == 0]
    stride = max(1, -(-len(inner) // (WIDTH_LEVELS - 1)))
    return (*inner[::stride], own)


def _align(width: int) -> int:
    """Round down to a multiple of 64, at least 32."""
    return max(32, width - width % WIDTH_STEP)
