"""One point of the joint space: per-layer widths, sparsity patterns and precisions; frozen, canonical, hashable."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal

Bits = Literal[2, 4, 8, 16, 32]
Activation = Literal["fp32", "int8", "dynamic", "static"]
Algorithm = Literal["rtn", "gptq", "clip"]
Half = Literal["fp16", "bf16"]
PatternKind = Literal["none", "2:4", "unstructured", "threshold", "block", "given"]
Score = Literal["magnitude", "activation", "wanda", "sparsegpt"]

# Width of a sparsity block: this many consecutive input features (along K) of one output row, as wide as the smallest
# quantization group of the space, so that an empty block is one that an engine could skip with its scale.
BLOCK = 32
# Runs of K that the engine's integer kernels know, largest first.
ENGINE_BLOCKS = (256, 128, 64, 32, 16)
LARGEST_INT2_BLOCK = 128
PER_CHANNEL = 0


@dataclass(frozen=True)
class Shape:
    """The teacher's shape. `heads` counts query heads; a KV group is one KV head with its `heads // kv_heads` query heads.

    `family` is the model_type, a key of teachers/checkpoint/families.py, which says what tensors a layer has. `positions` counts
    learned positions (0: rotary ones); `gated` FFNs have three matrices, others two.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = True
    family: str = "llama"
    positions: int = 0
    gated: bool = True

    @property
    def heads_per_group(self) -> int:
        """Number of query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def ffn_matrices(self) -> int:
        """Number of matrices in an FFN: 3 with a gate, 2 without."""
        return 3 if self.gated else 2

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once; biases, q/k norms and positions, about 1 %, are left out."""
        layer = (
            2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
            + self.ffn_matrices * self.hidden * self.ffn
            + 2 * self.hidden
        )
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden


@dataclass(frozen=True)
class Format:
    """Precision of one matrix: weights of `bits` and what multiplies them.

    16 bits are the floating-point type `half`, stored so and computed in fp32 where the engine has no arithmetic for it; 2, 4
    and 8 bits are integers in symmetric groups of `group_size` along K, `PER_CHANNEL` (0): one group per output row.

    `activation` "int8" means that the engine rounds the activations per group (ONNX Runtime accuracy_level 4); "dynamic" and
    "static" that all of a tensor share one scale, taken from the tensor itself or from calibration text, for 8 bits per
    channel. `algorithm` is how the codes are found: "rtn" rounds to nearest, "clip" searches each group's scale, "gptq"
    compensates on calibration text. Same grid, same kernel; only the values differ.
    """

    bits: Bits = 32
    group_size: int = 0
    activation: Activation = "fp32"
    algorithm: Algorithm = "rtn"
    half: Half = "fp16"

    @property
    def name(self) -> str:
        """The weights' type: fp32, fp16, bf16, int8, int4 or int2."""
        return self.half if self.bits == 16 else "fp32" if self.bits == 32 else f"int{self.bits}"

    @property
    def kernel(self) -> str:
        """The `<weights>/<activations>` pair by which profiles list what they execute."""
        return f"{self.name}/{self.activation}"

    @property
    def label(self) -> str:
        """For people: `int4`, or `int4 GPTQ`."""
        return f"{self.name} {ALGORITHM_NAMES[self.algorithm]}".strip()

    @property
    def is_integer(self) -> bool:
        """Whether weights are stored as integer codes."""
        return self.bits < 16

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale serves all activations of a matrix, which takes integer matrix products instead of MatMulNBits."""
        return self.activation in ("dynamic", "static")

    @property
    def needs_calibration(self) -> bool:
        """Whether codes or activation scale come from calibration text, so that they must be given when it is exported."""
        return self.is_integer and (self.algorithm != "rtn" or self.activation == "static")


# Settings that are left out of a candidate's JSON.
DEFAULTS = (("algorithm", "rtn"), ("half", "fp16"), ("hidden", 0))
ALGORITHM_NAMES = {"rtn": "", "gptq": "GPTQ", "clip": "clip"}
FP32 = Format()


@dataclass(frozen=True)
class Pattern:
    """Sparsity of one layer's matrices. `ratio` is the fraction of zeros: 0.5 for 2:4, in (0, 1) for the others.

    A "block" is `BLOCK` consecutive input features of one output row; it stays or goes as a whole. A "threshold" is one number
    for all matrices: what scores less than `threshold` times the matrix's root mean square goes, so a matrix with many small
    entries loses more than `ratio`, which is the share a normally distributed one would lose. "given" keeps the zeros that
    the teacher came with.
    """

    kind: PatternKind = "none"
    ratio: float = 0.0
    score: Score = "magnitude"

    @classmethod
    def below(cls, threshold: float, score: Score = "magnitude") -> Pattern:
        """The pattern that drops what scores less than `threshold` (> 0) times the matrix's root mean square."""
        if not threshold > 0:
            raise ValueError(f"a threshold is a positive multiple of the root mean square, but got {threshold}")
        return cls("threshold", 2 * NormalDist().cdf(threshold) - 1, score)

    @property
    def threshold(self) -> float:
        """In units of the matrix's root mean square; `ratio` of a normal distribution lies below it."""
        return NormalDist().inv_cdf((1 + self.ratio) / 2)

    @property
    def name(self) -> str:
        """For people: `dense`, `2:4 wanda`, `50% magnitude`, `50% blocks wanda`, `below 0.67 RMS magnitude`."""
        if self.kind == "threshold":
            return f"below {self.threshold:.2f} RMS {self.score}"
        shape = "blocks " if self.kind == "block" else ""
        plain = {"none": "dense", "given": "given mask", "2:4": f"2:4 {self.score}"}
        return plain.get(self.kind, f"{self.ratio:.0%} {shape}{self.score}")


DENSE = Pattern()
GIVEN = Pattern("given")


@dataclass(frozen=True)
class Layer:
    """One kept transformer layer."""

    ffn: int
    kv_groups: int
    attention_format: Format = FP32
    ffn_format: Format = FP32
    pattern: Pattern = DENSE


@dataclass(frozen=True)
class Candidate:
    """A student and everything done to it. Equal canonical candidates have equal keys.

    `hidden` is the width of the residual stream, 0 where it is the teacher's own.
    """

    layers: tuple[Layer, ...]
    head_format: Format = FP32
    embedding_format: Format = FP32
    hidden: int = 0

    def canonical(self, shape: Shape) -> Candidate:
        """Repair group sizes, drop settings that have no effect, so that equal computations are equal candidates.

        The embedding has no inputs to calibrate on, so it is rounded to nearest; and so is a head that shares its table.
        """
        width = self.width(shape)
        layers = tuple(
            replace(
                layer,
                attention_format=_repair(layer.attention_format, width),
                ffn_format=_repair(layer.ffn_format, width),
                pattern=_settle(layer.pattern),
            )
            for layer in self.layers
        )
        embedding = _repair(replace(self.embedding_format, activation="fp32", algorithm="rtn"), width)
        head = _repair(self.head_format, width)
        if shape.tied and shares_table(head, embedding):
            head = replace(head, algorithm="rtn")
        return Candidate(layers, head, embedding, 0 if width == shape.hidden else width)

    def width(self, shape: Shape) -> int:
        """Width of the residual stream."""
        return self.hidden or shape.hidden

    @cached_property
    def key(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @property
    def structure_key(self) -> str:
        """Key of what decides shapes: the number of layers and their widths."""
        widths = json.dumps(
            [[layer.ffn, layer.kv_groups] for layer in self.layers] + ([self.hidden] if self.hidden else [])
        )
        return hashlib.sha256(widths.encode()).hexdigest()[:16]

    @property
    def stratum(self) -> str:
        """Pattern and layer precision, the cells from which finalists are drawn: `dense/int4`, `block/mixed`, …

        A threshold leaves unstructured zeros, and a given mask costs a teacher that came with it nothing.
        """
        first = self.layers[0]
        kind = {"none": "dense", "given": "dense", "threshold": "unstructured"}.get(
            first.pattern.kind, first.pattern.kind
        )
        return f"{kind}/{self.layer_precision}"

    @property
    def layer_precision(self) -> str:
        """Name of the FFN's format; "mixed" where layers differ in bits."""
        kinds = {(x.attention_format.bits, x.ffn_format.bits) for x in self.layers}
        return "mixed" if len(kinds) > 1 else self.layers[0].ffn_format.name

    def is_full_size(self, shape: Shape) -> bool:
        """Whether nothing is cut away, so that the teacher's own weights serve."""
        return (
            len(self.layers) == shape.layers
            and self.width(shape) == shape.hidden
            and all(layer.ffn == shape.ffn and layer.kv_groups == shape.kv_heads for layer in self.layers)
        )

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix is in another format than fp32; 16-bit floats count too."""
        return any(f.bits != 32 for f in (*self._matmul_formats, self.embedding_format))

    @property
    def quantizer(self) -> Algorithm:
        """How codes are found: the first algorithm that is more than rounding to nearest, if any."""
        return next((f.algorithm for f in self._matmul_formats if f.algorithm != "rtn"), "rtn")

    @property
    def needs_calibration(self) -> bool:
        """Whether any matrix has codes or an activation scale from calibration text."""
        return any(f.needs_calibration for f in self._matmul_formats)

    @property
    def uses_dynamic_activations(self) -> bool:
        """Whether any matrix product takes the scale of its activations from the tensor itself."""
        return any(f.activation == "dynamic" for f in self._matmul_formats)

    @property
    def _matmul_formats(self) -> list[Format]:
        return [self.head_format, *(f for x in self.layers for f in (x.attention_format, x.ffn_format))]

    @property
    def is_sparse(self) -> bool:
        """Whether any layer has a pattern of zeros."""
        return any(layer.pattern.kind != "none" for layer in self.layers)

    def to_json(self) -> str:
        """Return the candidate as canonical JSON.

        Settings that later versions added are left out at their default, so that older candidates keep their keys.
        """
        return json.dumps(asdict(self, dict_factory=_without_defaults), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Candidate:
        """Return the candidate that `to_json` wrote."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Candidate:
        """Return the candidate of the parsed JSON that `to_json` wrote."""
        layers = tuple(
            Layer(
                d["ffn"],
                d["kv_groups"],
                Format(**d["attention_format"]),
                Format(**d["ffn_format"]),
                Pattern(**d["pattern"]),
            )
            for d in data["layers"]
        )
        return cls(
            layers, Format(**data["head_format"]), Format(**data["embedding_format"]), int(data.get("hidden", 0))
        )

    def describe(self) -> str:
        """One line for people: sizes if they are the same in every layer, formats with the number of layers that have them."""
        x = self.layers[0]
        uniform = len({(layer.ffn, layer.kv_groups, layer.pattern) for layer in self.layers}) == 1
        size = (
            f"{len(self.layers)} layers, FFN {x.ffn}, {x.kv_groups} KV groups"
            if uniform
            else f"{len(self.layers)} mixed layers"
        ) + (f", hidden {self.hidden}" if self.hidden else "")
        formats = (
            f"attn {_counted([layer.attention_format for layer in self.layers])}, "
            f"ffn {_counted([layer.ffn_format for layer in self.layers])}, "
            f"head {self.head_format.label}, embed {self.embedding_format.name}"
        )
        groups = sorted({f.group_size for f in (*self._matmul_formats, self.embedding_format) if f.is_integer})
        sizes = "/".join(str(g) for g in groups if g != PER_CHANNEL)
        group = (f", groups of {sizes}" if sizes else "") + (", per channel" if PER_CHANNEL in groups else "")
        return f"{size}; {x.pattern.name}; {formats}{group}{_activations(self)}"


def _without_defaults(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if (name, value) not in DEFAULTS}


def _counted(formats: list[Format]) -> str:
    """`int4`, or `int4 x4, int8 x2` where layers differ."""
    counts = Counter(f.label for f in sorted(formats, key=lambda f: f.bits))
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{label} x{n}" for label, n in counts.items())


def _activations(candidate: Candidate) -> str:
    names = {"fp32": "fp32", "int8": "int8", "dynamic": "dynamic int8", "static": "static int8"}
    kinds = sorted({names[f.activation] for f in candidate._matmul_formats if f.is_integer})
    return f", {'/'.join(kinds)} activations" if kinds else ""


def shares_table(head: Format, embedding: Format) -> bool:
    """Whether a tied head and embedding of these formats are one table in the file."""
    if head.bits == 16:
        return embedding.bits == 16 and head.half == embedding.half
    same = (head.bits, head.group_size) == (embedding.bits, embedding.group_size)
    return same and not head.is_per_tensor


def _repair(form: Format, k: int) -> Format:
    if form.bits == 32:
        return FP32
    if form.bits == 16:
        return Format(16, half=form.half)
    if form.is_per_tensor:
        if form.bits != 8:
            raise ValueError(
                f"{form.activation} activations take int8 weights, but got int{form.bits}: use int8 activations, per block"
            )
        return replace(form, group_size=PER_CHANNEL, half="fp16")
    if form.group_size != PER_CHANNEL:
        return replace(form, group_size=group_for(form.group_size, k), half="fp16")
    block_for(PER_CHANNEL, k)
    return replace(form, half="fp16")


def group_for(group_size: int, k: int) -> int:
    """The largest engine block (16 … 256) that is at most `group_size` and divides K; K itself for `PER_CHANNEL`."""
    return k if group_size == PER_CHANNEL else block_for(group_size, k)


def block_for(group_size: int, k: int, bits: int = 4) -> int:
    """The block that the engine computes groups of `group_size` in: for `PER_CHANNEL` the largest that divides K.

    Activations are rounded per block. 2-bit kernels know no block of 256. Raises ValueError if K is no multiple of 16.
    """
    most = min(group_size or ENGINE_BLOCKS[0], LARGEST_INT2_BLOCK if bits == 2 else ENGINE_BLOCKS[0])
    sizes = [size for size in ENGINE_BLOCKS if size <= most and k % size == 0]
    if not sizes:
        raise ValueError(
            f"K must be a multiple of 16 to be quantized in groups, but got K={k}, group_size={group_size}"
        )
    return sizes[0]


def _settle(pattern: Pattern) -> Pattern:
    if pattern.kind == "given":
        return GIVEN
    if pattern.kind == "none" or pattern.ratio <= 0:
        return DENSE
    return replace(pattern, ratio=0.5) if pattern.kind == "2:4" else pattern
