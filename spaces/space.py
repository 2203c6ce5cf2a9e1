"""The space a sampler sees: a few ordered integers and categories, decoded into layer-uniform candidates.

Or, where precision is mixed, into candidates whose layers differ in it: one integer, the mean bits per weight, is decoded
through the teacher's sensitivity table. The formats per matrix group then have no say.

Ordered choices (depth, widths, bits, group size, ratio) are integers, because every Optuna sampler treats categories as
unordered. What the profile has no kernel for is left out of the choices, so it is never proposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from paretune.spaces.candidate import (
    DENSE,
    FP32,
    PER_CHANNEL,
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
from paretune.spaces.mixed import Sensitivity, mean_bits, mix, stored_bits
from paretune.spaces.precision import DEFAULT_CHOICES, GROUP_SIZES, PrecisionChoices

__all__ = ["GROUP_SIZES", "RATIOS", "Space"]

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7)
PATTERNS: tuple[PatternKind, ...] = ("none", "2:4", "unstructured", "threshold", "block")
SCORES: tuple[Score, ...] = ("magnitude", "wanda", "sparsegpt")
QUANTIZERS: tuple[Algorithm, ...] = ("rtn", "gptq")
# Layers times the cube of the widest input: beyond this (about 200M parameters) GPTQ and SparseGPT take longer than all the
# rest of a rung-0 evaluation may.
MOST_SECOND_ORDER = 3e11
WIDTH_LEVELS = 12
WIDTH_STEP = 64
BITS_STEP = 0.25  # of the mean bits per weight of mixed candidates
STRUCTURE_AND_MIX = ("depth", "ffn", "kv_groups", "hidden", "effective_bits", "int4_activation", "quantizer")

# Precisions of weights, coarse to fine, and their bits.
LEVELS = {"int2": 2, "int4": 4, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}
INT4_ACTIVATIONS: tuple[Activation, ...] = ("int8", "fp32")
INT8_ACTIVATIONS: tuple[Activation, ...] = ("int8", "dynamic", "static")

Distribution = tuple[str, Any]


@dataclass(frozen=True)
class Space:
    """All layer-uniform candidates of a teacher's `shape`, in the precisions of `choices` that `kernels` execute.

    A kernel is named like `int4/int8`. With `mixed`, candidates whose layers differ in format belong to the space too;
    `sensitivity` assigns the formats, so it must be known before one is decoded.
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
    choices: PrecisionChoices = DEFAULT_CHOICES
    mixed: bool = False
    sensitivity: Sensitivity | None = None
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
        choices: PrecisionChoices = DEFAULT_CHOICES,
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
                choices=choices,
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
            choices=choices,
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

    @cached_property
    def levels(self) -> tuple[str, ...]:
        """Precisions of weights with a kernel, coarse to fine: a subset of int2, int4, int8, bf16, fp16, fp32."""
        names = {kernel.split("/")[0] for kernel in self._chosen_kernels}
        return tuple(name for name in LEVELS if name in names)

    @property
    def bits(self) -> tuple[int, ...]:
        """The bits of each of the `levels`."""
        return tuple(LEVELS[name] for name in self.levels)

    @cached_property
    def group_sizes(self) -> tuple[int, ...]:
        """Ascending group sizes that divide the hidden width (a narrow or odd one has fewer than were chosen), then per channel."""
        chosen = self.choices.group_sizes
        blocks = sorted({group_for(size, self.shape.hidden) for size in chosen if size != PER_CHANNEL})
        return (*blocks, PER_CHANNEL) if PER_CHANNEL in chosen else tuple(blocks)

    @property
    def is_second_order_affordable(self) -> bool:
        """Whether the teacher is small enough for GPTQ and SparseGPT, whose cost grows with the cube of a matrix's inputs."""
        return self.shape.layers * max(self.shape.hidden, self.shape.ffn) ** 3 <= MOST_SECOND_ORDER

    @property
    def has_second_order(self) -> bool:
        """Whether second-order methods are asked for and affordable."""
        return self.second_order and self.is_second_order_affordable

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that may rank weights for pruning; SparseGPT is one of them where `has_second_order`."""
        return SCORES if self.has_second_order else tuple(s for s in SCORES if s != "sparsegpt")

    @property
    def quantizers(self) -> tuple[Algorithm, ...]:
        """What can find the codes of an int4 or int2 matrix."""
        wanted = self.choices.quantizers or (QUANTIZERS if self.second_order else ("rtn",))
        return tuple(q for q in wanted if q != "gptq" or self.is_second_order_affordable)

    @cached_property
    def _chosen_kernels(self) -> frozenset[str]:
        return frozenset(self.choices.of(self.kernels))

    def _activations(self, level: str, wanted: tuple[Activation, ...]) -> tuple[Activation, ...]:
        """Those of the `wanted` activations that a kernel takes with weights of `level`."""
        return tuple(a for a in wanted if f"{level}/{a}" in self._chosen_kernels)

    @cached_property
    def _settings(self) -> dict[str, tuple[str, ...]]:
        """The categories beside the precisions themselves, where there is more than one choice."""
        found: dict[str, tuple[str, ...]] = {
            "int4_activation": self._activations("int4", INT4_ACTIVATIONS),
            "int8_activation": self._activations("int8", INT8_ACTIVATIONS),
            "quantizer": self.quantizers if {"int2", "int4"} & set(self.levels) else (),
        }
        return {name: values for name, values in found.items() if len(values) > 1}

    @property
    def mixed_formats(self) -> tuple[Format, ...]:
        """What a mixed candidate is made of: every group size up to 4 bits, the largest beyond, where it hardly matters."""
        groups = self.group_sizes
        found = (self.format(x, g) for x in self.levels for g in (groups if LEVELS[x] <= 4 else groups[-1:]))
        return tuple(f for f in found if not f.needs_calibration)

    @property
    def effective_bits(self) -> tuple[float, ...]:
        """Ascending mean bits per weight, scales included, from the smallest to the largest integer format in quarters."""
        k = self.shape.hidden
        found = [stored_bits(f, [(1, k)]) / k for f in self.mixed_formats if f.bits < 16] or [0.0]
        first, last = math.ceil(min(found) / BITS_STEP), math.floor(max(found) / BITS_STEP)
        return tuple(i * BITS_STEP for i in range(first, last + 1))

    @property
    def has_mixed(self) -> bool:
        """Whether mixed candidates are searched: if wanted, and if there are formats to mix."""
        return self.mixed and len(self.effective_bits) > 1

    def distributions(self) -> dict[str, Distribution]:
        """Sampler variables: name to ("int", (low, high)) or ("categorical", choices)."""
        top = len(self.levels) - 1
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
        found |= {name: ("categorical", values) for name, values in self._settings.items()}
        if len(self.hidden_widths) > 1:  # steps below the teacher's width, so that 0 is what studies without it did
            found["hidden"] = ("int", (0, len(self.hidden_widths) - 1))
        if self.has_mixed:
            found["precision_mode"] = ("categorical", ("uniform", "mixed"))
            found["effective_bits"] = ("int", (0, len(self.effective_bits) - 1))
        return found

    def decode(self, params: Mapping[str, Any]) -> Candidate:
        """The canonical candidate of a sampler's parameters."""
        group = self.group_sizes[params["group_size"]]
        settings = {name: params[name] for name in self._settings if name in params}
        attention, ffn, head, embedding = (
            self.format(self.levels[params[f"{name}_bits"]], group, **settings)
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
        uniform = Candidate((layer,) * params["depth"], head, embedding, hidden).canonical(self.shape)
        return self._mix(uniform, params) if params.get("precision_mode") == "mixed" else uniform

    def _mix(self, uniform: Candidate, params: Mapping[str, Any]) -> Candidate:
        """The student of `uniform` with the formats that `effective_bits` buys, their activations and quantizer as wanted."""
        if self.sensitivity is None:
            raise ValueError(
                "a mixed candidate is decoded through the sensitivity table, but the space has none: measure it first"
            )
        target = self.effective_bits[params["effective_bits"]]
        found = mix(uniform, self.sensitivity, self.shape, uniform.width(self.shape), target)
        wanted, quantizer = params.get("int4_activation", "int8"), params.get("quantizer", "rtn")

        def dressed(form: Format) -> Format:
            return self.format(form.name, form.group_size, wanted, quantizer=quantizer)

        layers = tuple(
            replace(x, attention_format=dressed(x.attention_format), ffn_format=dressed(x.ffn_format))
            for x in found.layers
        )
        head, embedding = dressed(found.head_format), dressed(found.embedding_format)
        return replace(found, layers=layers, head_format=head, embedding_format=embedding).canonical(self.shape)

    def encode(self, candidate: Candidate) -> dict[str, Any]:
        """Sampler parameters of a candidate; `decode(encode(c)) == c`. Raises ValueError if it has none.

        The variable that has no say, `effective_bits` of a uniform candidate, is the level nearest to the bits it takes.
        """
        if not self.has_mixed:
            return self._encode_uniform(candidate)
        try:
            params = self._encode_uniform(candidate) | {"precision_mode": "uniform"}
        except ValueError:
            return self._encode_mixed(candidate)
        levels, bits = self.effective_bits, mean_bits(candidate, self.shape, candidate.width(self.shape))
        return params | {"effective_bits": min(range(len(levels)), key=lambda i: abs(levels[i] - bits))}

    def _encode_mixed(self, candidate: Candidate) -> dict[str, Any]:
        """The lowest level of `effective_bits` that decodes into the candidate."""
        plain = self.format(self.levels[-1], self.group_sizes[0])
        layers = tuple(replace(x, attention_format=plain, ffn_format=plain) for x in candidate.layers)
        bare = replace(candidate, layers=layers, head_format=plain, embedding_format=plain).canonical(self.shape)
        params = self._encode_uniform(bare) | {"precision_mode": "mixed"}
        ranges = self._values("effective_bits", "int4_activation", "quantizer")
        for values in itertools.product(*ranges.values()) if self.sensitivity is not None else ():
            found = params | dict(zip(ranges, values, strict=True))
            if self.decode(found) == candidate:
                return found
        raise ValueError(f"the candidate lies outside this space: {candidate.describe()}")

    def _encode_uniform(self, candidate: Candidate) -> dict[str, Any]:
        """Sampler parameters of a layer-uniform candidate."""
        x = candidate.layers[0]
        if any(layer != x for layer in candidate.layers):
            raise ValueError("only layer-uniform candidates have sampler parameters")
        formats = (x.attention_format, x.ffn_format, candidate.head_format, candidate.embedding_format)
        attention, ffn, head, embedding = (self.levels.index(f.name) for f in formats)
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
        }
        used: dict[str, str] = {f"{f.name}_activation": f.activation for f in formats[:3]}
        used["quantizer"] = candidate.quantizer
        params |= {name: used.get(name, values[0]) for name, values in self._settings.items()}
        if "hidden" in self.distributions():
            widths = self.hidden_widths
            params["hidden"] = len(widths) - 1 - widths.index(candidate.width(self.shape))
        for group in range(len(self.group_sizes)):
            if self.decode(params | {"group_size": group}) == candidate:
                return params | {"group_size": group}
        raise ValueError(f"the candidate lies outside this space: {candidate.describe()}")

    def format(
        self,
        level: str,
        group_size: int = 32,
        int4_activation: Activation = "int8",
        int8_activation: Activation = "int8",
        quantizer: Algorithm = "rtn",
    ) -> Format:
        """The format of `level` with the activations its kernel takes: the wanted ones or what there is (int8 weights run with
        fp32 activations only where nothing else does).

        `quantizer` is for 4-bit and 2-bit weights; int8 is always rounded to nearest, where there is next to nothing to repair.
        """
        if level == "fp32":
            return FP32
        if level in ("fp16", "bf16"):
            return Format(16, half="bf16" if level == "bf16" else "fp16")
        if level == "int8":
            found = self._activations(level, (int8_activation, *INT8_ACTIVATIONS, "fp32"))
            return Format(8, group_size, found[0])
        wanted: Activation = int4_activation if level == "int4" else "int8"
        found = self._activations(level, (wanted, "int8", "fp32"))
        return Format(4 if level == "int4" else 2, group_size, found[0], quantizer)

    def baselines(self) -> list[Candidate]:
        """The unmodified teacher at fp32, int8 and int4 (those of the space), in the smallest groups."""
        found = []
        for level in ("fp32", "int8", "int4"):
            if level in self.levels:
                form = self.format(level, self.group_sizes[0])
                layer = Layer(self.shape.ffn, self.shape.kv_heads, form, form, DENSE)
                found.append(Candidate((layer,) * self.shape.layers, form, form).canonical(self.shape))
        return found

    def size(self) -> int:
        """Number of distinct (canonical) candidates; of mixed ones an upper bound until `sensitivity` is known."""
        ratios = len(self.scores) * len(RATIOS)
        patterns = 1 + len(self.scores) + (len(PATTERNS) - 2) * ratios + int(self.given)
        sizes = (
            (self.shape.layers - self.min_depth + 1)
            * len(self.ffn_widths)
            * (self.shape.kv_heads - self.min_kv_groups + 1)
        )
        return (
            sizes * patterns * sum(self._precisions(hidden) for hidden in self.hidden_widths)
            + patterns * self._mixed_size()
        )

    def _precisions(self, hidden: int) -> int:
        """Number of distinct precisions of a student of that width."""
        groups = len({group_for(size, hidden) if size else PER_CHANNEL for size in self.group_sizes})
        activations = self._settings.get("int8_activation") or self._activations("int8", INT8_ACTIVATIONS) or ("fp32",)
        precisions = 0
        for combination in itertools.product(self.levels, repeat=4):
            chosen = activations if "int8" in combination[:3] else activations[:1]
            precisions += sum(self._variants(combination, activation, groups) for activation in chosen)
        return precisions

    def _variants(self, levels: tuple[str, ...], int8_activation: str, groups: int) -> int:
        """Distinct settings of a combination of precisions (attention, FFN, head, embedding): groups, activations, quantizer."""
        matmuls, per_tensor = levels[:3], int8_activation in ("dynamic", "static")
        in_groups = [
            x for i, x in enumerate(levels) if x.startswith("int") and not (per_tensor and x == "int8" and i < 3)
        ]
        one_table = self.shape.tied and levels[2] == levels[3]
        found_by_quantizer = {"int2", "int4"} & set(matmuls[:2] if one_table else matmuls)
        activations = len(self._settings.get("int4_activation", ("int8",))) if "int4" in matmuls else 1
        quantizers = len(self._settings.get("quantizer", ("rtn",))) if found_by_quantizer else 1
        return (groups if in_groups else 1) * activations * quantizers

    def _mixed_size(self) -> int:
        """How many dense candidates are mixed and no uniform ones besides."""
        if not self.has_mixed:
            return 0
        ranges = self._values(*STRUCTURE_AND_MIX)
        if self.sensitivity is None:
            return math.prod(map(len, ranges.values()))
        base = self._encode_uniform(self.baselines()[0]) | {"precision_mode": "mixed"}
        rows = (dict(zip(ranges, values, strict=True)) for values in itertools.product(*ranges.values()))
        return sum(not self._is_uniform(c) for c in {self.decode(base | row) for row in rows})

    def _is_uniform(self, candidate: Candidate) -> bool:
        try:
            self._encode_uniform(candidate)
        except ValueError:
            return False
        return True

    def _values(self, *names: str) -> dict[str, tuple[Any, ...]]:
        """All values of those variables that the space has."""
        found = self.distributions()
        return {
            name: tuple(range(bounds[0], bounds[1] + 1)) if kind == "int" else bounds
            for name, (kind, bounds) in found.items()
            if name in names
        }

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
