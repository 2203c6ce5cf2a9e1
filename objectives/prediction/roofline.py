"""What a decoder does in one step on one device, per fused op of the engine: operations, bytes, and the time they take at least.

The ops are those of the exported graph: norm, packed q/k/v product, attention over the KV cache, output product, norm, packed
gate/up product, activation, down product; then norm and head; and the embedding's rows before. An op takes

    max(bytes / (bandwidth x efficiency), operations / (peak x efficiency)) + overhead,

with the peak of the arithmetic that the target really uses (hardware_profiles/execution.py), and the efficiencies and overhead
that its profile states as priors. Weights are read from main memory unless the profile states a cache; without one, a model
that fits it may be faster than its interval. Williams et al. 2009, "Roofline"; for decoders: LIFE, arXiv 2508.00904.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from paretune.hardware_profiles.execution import executed, has_sparse_kernel, peak_flops, widens_each_call
from paretune.hardware_profiles.kernels import Kernel, weight_bits
from paretune.hardware_profiles.schema import Profile
from paretune.spaces.candidate import DENSE, Candidate, Format, Layer, Pattern, Shape, group_for, shares_table

# A 2:4 kernel's products run at up to twice the dense rate; published gains lie between none and nearly that.
SPEEDUP_2_4 = (1.0, 1.5, 2.0)
# Bits that say which two of four weights are kept, per kept weight; index of a kept weight without a pattern.
POSITION_BITS, INDEX_BITS = 2, 16


@dataclass(frozen=True)
class Step:
    """One call: `tokens` new ones in each of `batch` sequences that have `past` tokens in their caches."""

    tokens: int
    past: int
    batch: int = 1

    @property
    def rows(self) -> int:
        """Number of new tokens in all sequences together."""
        return self.tokens * self.batch


@dataclass(frozen=True)
class FusedOp:
    """One fused op. `flops` counts a multiply-add as two; `weight_bytes` are read from the weights (with scales), `cache_bytes`
    from and to the KV cache, `other_bytes` are activations.

    `layer` is None outside of layers, `kernel` what its arithmetic is. `speedup` (low, likely, high) is what a sparse kernel gains
    on the dense peak. `split` says whether tensor parallelism divides it.
    """

    name: str
    layer: int | None
    kernel: Kernel
    flops: float
    weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    other_bytes: float = 0.0
    speedup: tuple[float, float, float] = (1.0, 1.0, 1.0)
    split: bool = True

    @property
    def bytes(self) -> float:
        """All bytes that the op moves: weights, KV cache and activations."""
        return self.weight_bytes + self.cache_bytes + self.other_bytes

    @property
    def intensity(self) -> float:
        """Operations per byte; left of the roofline's ridge an op waits for memory."""
        return self.flops / self.bytes

    def divided(self, degree: int) -> FusedOp:
        """One device's part of `degree`."""
        if degree == 1 or not self.split:
            return self
        return replace(
            self,
            flops=self.flops / degree,
            weight_bytes=self.weight_bytes / degree,
            cache_bytes=self.cache_bytes / degree,
            other_bytes=self.other_bytes / degree,
        )


@dataclass(frozen=True)
class Milliseconds:
    """A time and its bounds at the profile's priors; `waits` says whether memory or arithmetic bounds the likely one, `table_share`
    which part of it comes from measured tables."""

    low: float
    likely: float
    high: float
    waits: str = "memory"
    table_share: float = 0.0


def seconds_per_byte(profile: Profile, step_bytes: float) -> tuple[float, float, float]:
    """Return the seconds to read a byte at the low, likely and high efficiency; the step reads `step_bytes` in all.

    If the profile states a cache, a step that fits into it reads from there, and one of twice its size or more from
    memory; in between the share of the cache falls linearly. At the low efficiency everything comes from memory.
    """
    assert profile.bandwidth_gb_per_s is not None
    memory = 1 / (profile.bandwidth_gb_per_s * 1e9)
    both = memory
    if profile.cache_bytes is not None and profile.cache_gb_per_s is not None:
        share = min(1.0, max(0.0, 2 - step_bytes / profile.cache_bytes))
        both = share / (profile.cache_gb_per_s * 1e9) + (1 - share) * memory
    low, likely, high = profile.bandwidth_efficiency
    return memory / low, both / likely, both / high


def time_of(work: FusedOp, profile: Profile, step_bytes: float = math.inf) -> Milliseconds:
    """Roofline time of one op in a step of `step_bytes`; low is at the high efficiencies and the low overhead. The profile must
    have the figures."""
    reading = seconds_per_byte(profile, step_bytes)
    compute_s = work.flops / peak_flops(profile, work.kernel)
    found = [
        1e3 * max(work.bytes * per_byte, compute_s / (compute * speedup)) + overhead / 1e3
        for per_byte, compute, speedup, overhead in zip(
            reading, profile.compute_efficiency, work.speedup, reversed(profile.overhead_us_per_op), strict=True
        )
    ]
    likely_compute = compute_s / (profile.compute_efficiency[1] * work.speedup[1])
    return Milliseconds(
        found[2], found[1], found[0], "memory" if work.bytes * reading[1] >= likely_compute else "arithmetic"
    )


def works(candidate: Candidate, shape: Shape, profile: Profile, step: Step) -> list[FusedOp]:
    """All fused ops of one step on `profile`, in the graph's order.

    The head computes the logits of all new tokens, as the exported graph does.
    """
    width, item = candidate.width(shape), activation_bytes(candidate, profile)
    float_kernel: Kernel = "fp16/fp32" if item == 2 else "fp32/fp32"
    embedding = table_bytes(candidate.embedding_format, step.rows, width, profile)
    moved = step.rows * width * item
    norm = FusedOp("norm", None, float_kernel, 4 * step.rows * width, other_bytes=2 * moved, split=False)
    found = [FusedOp("embedding", None, float_kernel, 0.0, embedding, other_bytes=moved, split=False)]
    for index, layer in enumerate(candidate.layers):
        found += [replace(w, layer=index) for w in _layer(layer, shape, width, item, profile, step, norm)]
    found += [norm, _product("head", candidate.head_format, DENSE, shape.vocab, width, item, profile, step)]
    return found


def _layer(
    layer: Layer, shape: Shape, width: int, item: int, profile: Profile, step: Step, norm: FusedOp
) -> list[FusedOp]:
    inner, cache = _heads(layer, shape)
    qkv, o, up, down = (
        _product(name, form, layer.pattern, n, k, item, profile, step)
        for name, form, n, k in _matrices(layer, shape, width)
    )
    packed = shape.ffn_matrices - 1
    activation = FusedOp(
        "activation",
        None,
        norm.kernel,
        5 * step.rows * layer.ffn,
        other_bytes=(packed + 1) * step.rows * layer.ffn * item,
    )
    return [norm, qkv, _attention(inner, cache, item, norm.kernel, step), o, norm, up, activation, down]


def _heads(layer: Layer, shape: Shape) -> tuple[int, int]:
    """Widths of the queries, and of the keys or the values."""
    cache = layer.kv_groups * shape.head_dim
    return cache * shape.heads_per_group, cache


def _matrices(layer: Layer, shape: Shape, width: int) -> list[tuple[str, Format, int, int]]:
    """Name, format, N and K of the products of a layer, as the engine packs them."""
    inner, cache = _heads(layer, shape)
    return [
        ("qkv", layer.attention_format, inner + 2 * cache, width),
        ("o", layer.attention_format, width, inner),
        ("gate_up" if shape.gated else "up", layer.ffn_format, (shape.ffn_matrices - 1) * layer.ffn, width),
        ("down", layer.ffn_format, width, layer.ffn),
    ]


def _attention(inner: int, cache: int, item: int, kernel: Kernel, step: Step) -> FusedOp:
    """Scores and their product with the values: token i of a step sees the past and i + 1 new tokens. The cache is read once."""
    seen = step.past + (step.tokens + 1) / 2
    read = 2 * step.batch * (step.past + step.tokens) * cache * item
    written = 2 * step.rows * cache * item
    return FusedOp(
        "attention",
        None,
        kernel,
        4 * step.rows * seen * inner,
        cache_bytes=read + written,
        other_bytes=2 * step.rows * inner * item,
    )


def _product(
    name: str, form: Format, pattern: Pattern, n: int, k: int, item: int, profile: Profile, step: Step
) -> FusedOp:
    """A product of `rows` x K activations with N x K weights."""
    kernel = executed(profile, form.kernel)
    weights, flops = weights_bytes(form, n, k, profile, pattern), 2.0 * step.rows * n * k
    speedup = (1.0, 1.0, 1.0)
    kind = kind_of(pattern)
    if kind is not None and has_sparse_kernel(profile, kind, kernel):
        if kind == "2:4":
            speedup = SPEEDUP_2_4
        else:
            flops *= 1 - pattern.ratio
    if widens_each_call(profile, kernel):
        weights += 2 * 4 * n * k
    return FusedOp(name, None, kernel, flops, weights, other_bytes=step.rows * (n + k) * item, speedup=speedup)


def weights_bytes(form: Format, n: int, k: int, profile: Profile, pattern: Pattern = DENSE) -> float:
    """Bytes of N x K weights as the target keeps them: codes of the executed width, scales, and positions where it has a sparse
    kernel. Zeros of any other pattern are kept like other weights."""
    kernel = executed(profile, form.kernel)
    own = weight_bits(kernel)
    bits = float(own)
    kind = kind_of(pattern)
    if kind is not None and has_sparse_kernel(profile, kind, kernel):
        extra = POSITION_BITS if kind == "2:4" else INDEX_BITS
        bits = min(bits, (1 - pattern.ratio) * (bits + extra))
    return n * k * bits / 8 + (_scales(form, n, k, profile) if own < 16 else 0.0)


def table_bytes(form: Format, rows: int, width: int, profile: Profile) -> float:
    """Bytes of rows of an embedding: looked up and widened row by row, which takes no kernel."""
    return rows * width * form.bits / 8 + (_scales(form, rows, width, profile) if form.is_integer else 0.0)


def _scales(form: Format, n: int, k: int, profile: Profile) -> float:
    return n * k / group_for(form.group_size, k) * (2 if profile.computes_half else 4)


def kind_of(pattern: Pattern) -> str | None:
    """The name by which profiles list a pattern's kernel; None for dense layers and patterns that no profile can list."""
    return {"2:4": "2:4", "unstructured": "unstructured", "threshold": "unstructured"}.get(pattern.kind)


def activation_bytes(candidate: Candidate, profile: Profile) -> int:
    """2 where the target computes 16-bit floats and some matrix is not fp32, else 4; so are the entries of the KV cache."""
    forms = [candidate.head_format, *(f for x in candidate.layers for f in (x.attention_format, x.ffn_format))]
    return 2 if profile.computes_half and any(executed(profile, f.kernel) != "fp32/fp32" for f in forms) else 4


def resident_bytes(candidate: Candidate, shape: Shape, profile: Profile, step: Step) -> tuple[float, float, float]:
    """Bytes in memory during a step: weights (a table that head and embedding share counts once), KV cache of past and new
    tokens, and the largest activations (logits included)."""
    width, item = candidate.width(shape), activation_bytes(candidate, profile)
    weights = weights_bytes(candidate.head_format, shape.vocab, width, profile)
    for layer in candidate.layers:
        weights += sum(
            weights_bytes(form, n, k, profile, layer.pattern) for _, form, n, k in _matrices(layer, shape, width)
        )
    if not (shape.tied and shares_table(candidate.head_format, candidate.embedding_format)):
        weights += table_bytes(candidate.embedding_format, shape.vocab, width, profile)
    length = step.batch * (step.past + step.tokens)
    cache = sum(2 * length * layer.kv_groups * shape.head_dim * item for layer in candidate.layers)
    widest = max(max(layer.ffn for layer in candidate.layers) * shape.ffn_matrices, 4 * width)
    return weights, float(cache), float(step.rows * max(widest * item, shape.vocab * 4))
