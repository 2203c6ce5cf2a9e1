"""From an engine's profile to where compression would pay. Pure: values in, findings out.

A node is placed by its name (`/model/layers.3/mlp/up_proj`); one that the engine has fused and named anew belongs where the
node before it does. Arithmetic and bytes follow from the shapes that the engine saw, the bytes of weights from the
candidate's formats. The roofline is Williams, Waterman and Patterson's (2009): an op takes at least its bytes over the
bandwidth, and at least its arithmetic over the peak.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paretune.spaces.candidate import FP32, Candidate, Format
from paretune.spaces.mixed import stored_bits

Group = Literal["embedding", "attention", "ffn", "head", "other"]
Phase = Literal["prefill", "decode"]
MATRIX_GROUPS: tuple[Group, ...] = ("attention", "ffn", "head", "embedding")
PHASES: tuple[Phase, ...] = ("prefill", "decode")

LAYER = re.compile(r"^/model/layers\.(\d+)/(\w+)")
OUTSIDE: tuple[tuple[str, Group], ...] = (
    ("/lm_head", "head"),
    ("/model/norm", "head"),
    ("/model/embed_tokens", "embedding"),
    ("/model/positions", "embedding"),
    ("/model/mask", "other"),
)
# The ops that multiply by a matrix of weights, under the names that ONNX Runtime gives them before and after it fuses.
MATRIX_OPS = {
    "MatMul",
    "Gemm",
    "FusedMatMul",
    "FusedGemm",
    "MatMulNBits",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "QGemm",
}
ATTENTION_OPS = {"GroupQueryAttention", "MultiHeadAttention", "Attention"}
LOOKUP_OPS = {"Gather", "GatherBlockQuantized", "Reshape", "Shape", "Transpose"}
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Node:
    """One node of the engine's profile in one phase: milliseconds of one run, the shapes that it saw, bytes of activations."""

    name: str
    op: str
    phase: str
    ms: float
    inputs: tuple[tuple[int, ...], ...] = ()
    output: tuple[int, ...] = ()
    moved_bytes: int = 0

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Node:
        """Return the node of a row that `rows_of` in engines/onnxruntime/node_times.py made."""
        shapes = tuple(tuple(shape) for shape in row["inputs"])
        return cls(
            row["name"], row["op"], row["phase"], row["ms"], shapes, tuple(row["output"]), int(row["moved_bytes"])
        )


@dataclass(frozen=True)
class Roof:
    """What the machine does at most, on the threads that were measured; `source` says how that is known."""

    bandwidth_gb_per_s: float
    fp32_gflop_per_s: float
    int8_gop_per_s: float
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("bandwidth_gb_per_s", "fp32_gflop_per_s", "int8_gop_per_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} of a roofline must be finite and more than 0, but got {value}")

    def peak(self, form: Format) -> float:
        """10^9 operations per second with weights in `form`."""
        integer = form.is_integer and form.activation != "fp32"
        return self.int8_gop_per_s if integer else self.fp32_gflop_per_s

    def ms(self, flops: float, moved: float, form: Format = FP32) -> float:
        """The least milliseconds for `flops` operations and `moved` bytes."""
        return max(flops / self.peak(form), moved / self.bandwidth_gb_per_s) / 1e6

    def bound(self, flops: float, moved: float, form: Format = FP32) -> Literal["memory", "compute"]:
        """What the roof is at this intensity."""
        return "compute" if flops / self.peak(form) > moved / self.bandwidth_gb_per_s else "memory"


@dataclass(frozen=True)
class OpCost:
    """A node with its place, arithmetic and bytes (activations, weights, cache) in one run of its phase.

    `matrix` is [N, K] of the weights it multiplies by, in `form`; None for other ops. `layer` is None outside the layers.
    """

    name: str
    op: str
    phase: str
    layer: int | None
    group: Group
    ms: float
    flops: float
    bytes: float
    form: Format = FP32
    matrix: tuple[int, int] | None = None

    def weight_bytes(self, form: Format) -> float:
        """Bytes that the weights take in `form` while the engine computes: 16-bit floats are widened when they are loaded."""
        if self.matrix is None:
            return 0.0
        return stored_bits(FP32 if form.bits == 16 else form, [self.matrix]) / 8


@dataclass(frozen=True)
class Total:
    """Ops added up: milliseconds, operations and bytes of one run, where it is under the roof."""

    label: str
    count: int
    ms: float
    share: float
    flops: float
    bytes: float
    roof_ms: float
    bound: Literal["memory", "compute"]

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def gflop_per_s(self) -> float:
        """10^9 operations per second that the ops reached; 0 if they took no time."""
        return self.flops / self.ms / 1e6 if self.ms else 0.0

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second that the ops moved; 0 if they took no time."""
        return self.bytes / self.ms / 1e6 if self.ms else 0.0

    @property
    def efficiency(self) -> float:
        """Share of the roof that is reached. Above 1 where weights stay in a cache that is faster than the memory behind it."""
        return self.roof_ms / self.ms if self.ms else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the rates that follow from them as a dictionary."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__}
        derived = ("intensity", "gflop_per_s", "gb_per_s", "efficiency")
        return own | {name: getattr(self, name) for name in derived}


@dataclass
class _Where:
    """Where the last node with a path of ours was."""

    layer: int | None = None
    group: Group = "other"

    def of(self, name: str) -> tuple[int | None, Group]:
        if found := LAYER.match(name):
            attention = found[2] in ("attn", "input_layernorm")
            self.layer, self.group = int(found[1]), "attention" if attention else "ffn"
        else:
            for start, group in OUTSIDE:
                if name.startswith(start):
                    self.layer, self.group = None, group
        return self.layer, self.group


def op_costs(nodes: Iterable[Node], candidate: Candidate, keys: Mapping[str, float]) -> list[OpCost]:
    """Place, arithmetic and bytes of every node; `keys` is how many positions a query attends to on average, by phase.

    Nodes come in the order of execution, phase by phase. Raises ValueError where a node names a layer that the candidate lacks.
    """
    found, where = [], dict[str, _Where]()
    for node in nodes:
        layer, group = where.setdefault(node.phase, _Where()).of(node.name)
        if layer is not None and layer >= len(candidate.layers):
            raise ValueError(f"the graph must have {len(candidate.layers)} layers, but the engine ran {node.name}")
        form = format_of(candidate, layer, group)
        matrix = _matrix(node) if node.op in MATRIX_OPS else None
        cost = OpCost(node.name, node.op, node.phase, layer, group, node.ms, 0.0, 0.0, form, matrix)
        flops, extra = _work(node, cost, keys.get(node.phase, 0.0))
        found.append(OpCost(**{**cost.__dict__, "flops": flops, "bytes": node.moved_bytes + extra}))
    return found


def format_of(candidate: Candidate, layer: int | None, group: Group) -> Format:
    """The candidate's format of a matrix group; fp32 for what has no weights to speak of."""
    if layer is not None:
        own = candidate.layers[layer]
        return own.attention_format if group == "attention" else own.ffn_format
    return {"head": candidate.head_format, "embedding": candidate.embedding_format}.get(group, FP32)


def _matrix(node: Node) -> tuple[int, int] | None:
    """[N, K] by what goes in and comes out: the engine does not list weights that it has packed."""
    return (node.output[-1], node.inputs[0][-1]) if node.inputs and node.inputs[0] and node.output else None


def _work(node: Node, cost: OpCost, keys: float) -> tuple[float, float]:
    """(operations, bytes beside the activations)."""
    size = float(math.prod(node.output)) if node.output else 0.0
    if cost.matrix is not None:
        return 2 * size * cost.matrix[1], cost.weight_bytes(cost.form)
    if node.op in ATTENTION_OPS:
        caches = [shape for shape in node.inputs if len(shape) == 4]
        row = caches[0][1] * caches[0][3] if caches else 0
        # The engine counts whole cache buffers as moved, inputs and outputs alike; what is read is what is attended to.
        own = sum(math.prod(shape) for shape in node.inputs if len(shape) == 3) + size
        return 4 * size * keys, FLOAT_BYTES * (own + 2 * row * keys) - node.moved_bytes
    return (0.0 if node.op in LOOKUP_OPS else size), 0.0


def totals(costs: Sequence[OpCost], roof: Roof, phase: str, label: Callable[[OpCost], str]) -> tuple[Total, ...]:
    """The ops of a phase added up by `label`, the longest first. The roof is that of every op by itself."""
    found: dict[str, list[OpCost]] = {}
    for cost in costs:
        if cost.phase == phase:
            found.setdefault(label(cost), []).append(cost)
    whole = sum(c.ms for same in found.values() for c in same)
    rows = [_total(name, same, roof, whole) for name, same in found.items()]
    return tuple(sorted(rows, key=lambda t: (-t.ms, t.label)))


def _total(name: str, costs: Sequence[OpCost], roof: Roof, whole: float) -> Total:
    ms, flops, moved = (sum(getattr(c, what) for c in costs) for what in ("ms", "flops", "bytes"))
    bounds: dict[Literal["memory", "compute"], float] = {"memory": 0.0, "compute": 0.0}
    for c in costs:
        bounds[roof.bound(c.flops, c.bytes, c.form)] += roof.ms(c.flops, c.bytes, c.form)
    bound: Literal["memory", "compute"] = "compute" if bounds["compute"] > bounds["memory"] else "memory"
    share = ms / whole if whole else 0.0
    return Total(name, len(costs), ms, share, flops, moved, sum(bounds.values()), bound)


def by_op(cost: OpCost) -> str:
    """Return the op's type."""
    return cost.op


def by_group(cost: OpCost) -> str:
    """Return the op's matrix group."""
    return cost.group


def by_place(cost: OpCost) -> str:
    """`layer 3 ffn`, or the group outside the layers."""
    return cost.group if cost.layer is None else f"layer {cost.layer} {cost.group}"


def by_layer(cost: OpCost) -> str:
    """`layer 3`, or the group outside the layers."""
    return cost.group if cost.layer is None else f"layer {cost.layer}"
