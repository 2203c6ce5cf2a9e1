"""The latency fit: decode and prefill milliseconds as a non-negative sum of what a decoder's engine ops cost.

Terms: a constant, the number of layers, the layers' weights per kernel, the head's weights per kernel, the KV cache; and the
quantization groups, each of which costs a scale, and what of the weights is more than a CPU's cache holds. Each is a sum over
layers, so per-layer widths and precisions need no terms of their own; terms per matrix, tried on three studies, only made the
held-out error larger. Fitted by relative least squares to measurements of this machine; predictions say "predicted" and carry
the fit's held-out error.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paretune.hardware_profiles.kernels import STORAGE_ONLY
from paretune.objectives.measurement import Measurement
from paretune.spaces.candidate import Candidate, Format, Shape, group_for
from paretune.spaces.kinds import AnyCandidate, AnyShape, AnySpace
from paretune.spaces.module_candidate import ModuleCandidate, ModuleShape

# Kernels with a cost of their own, and the bits of their weights. Weights that are only stored in 16 bits cost what fp32 does.
KERNEL_BITS = {
    "fp32/fp32": 32,
    "int8/int8": 8,
    "int8/fp32": 8,
    "int4/int8": 4,
    "int4/fp32": 4,
    "int8/dynamic": 8,
    "int8/static": 8,
    "int2/int8": 2,
    "int2/fp32": 2,
}
# Weights beyond so many megabytes are read from memory in every step. Half of the L3 that the machine of docs/log.md reports;
# where all models are smaller, or all larger, the term adds nothing to the others.
CACHE_MEGABYTES = 16.0
MIN_POINTS = 2
FOLDS = 5
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FitError:
    """Held-out relative error over `points` measurements in five folds, and rank agreement, beside that of parameters x bits."""

    median: float
    worst: float
    p95: float
    kendall_tau: float
    params_bits_tau: float
    points: int


def weights_per_kernel(candidate: Candidate, shape: Shape) -> tuple[dict[str, float], dict[str, float]]:
    """Millions of weights that each kernel multiplies by: those of the layers, and those of the head."""
    layers, head = dict.fromkeys(KERNEL_BITS, 0.0), dict.fromkeys(KERNEL_BITS, 0.0)
    hidden = candidate.width(shape)
    for layer in candidate.layers:
        width = layer.kv_groups * shape.head_dim * (shape.heads_per_group + 1)
        layers[_computed(layer.attention_format)] += 2 * hidden * width / 1e6
        layers[_computed(layer.ffn_format)] += shape.ffn_matrices * hidden * layer.ffn / 1e6
    head[_computed(candidate.head_format)] += shape.vocab * hidden / 1e6
    return layers, head


def features(candidate: Candidate, shape: Shape) -> Array:
    """The terms of one candidate, weights in millions. Zeros count in full: no kernel of the engine skips them."""
    layers, head = weights_per_kernel(candidate, shape)
    cache = sum(layer.kv_groups * shape.head_dim for layer in candidate.layers) / 1e3
    return np.array([1.0, len(candidate.layers), *layers.values(), *head.values(), cache])


def params_times_bits(candidate: Candidate, shape: Shape) -> float:
    """The naive proxy that a latency model has to beat: megabits of weights read per token."""
    return sum(
        millions * KERNEL_BITS[kernel]
        for found in weights_per_kernel(candidate, shape)
        for kernel, millions in found.items()
    )


def _computed(form: Format) -> str:
    return STORAGE_ONLY.get(form.kernel, form.kernel)


def terms(candidate: AnyCandidate, shape: AnyShape) -> Array:
    """The terms of either kind of candidate."""
    if isinstance(shape, ModuleShape):
        assert isinstance(candidate, ModuleCandidate)
        return _module_terms(candidate, shape)
    assert isinstance(candidate, Candidate)
    beyond = max(0.0, params_times_bits(candidate, shape) / 8 - CACHE_MEGABYTES)
    return np.array([*features(candidate, shape), quantization_groups(candidate, shape), beyond])


def quantization_groups(candidate: Candidate, shape: Shape) -> float:
    """Millions of groups that have a scale, in layers and head; those of the embedding are looked up, not multiplied by."""
    hidden = candidate.width(shape)
    matrices = [(candidate.head_format, shape.vocab, hidden)]
    for layer in candidate.layers:
        heads = layer.kv_groups * shape.head_dim
        inner = heads * shape.heads_per_group
        matrices += [(layer.attention_format, inner + 2 * heads, hidden), (layer.attention_format, hidden, inner)]
        up = (shape.ffn_matrices - 1) * layer.ffn
        matrices += [(layer.ffn_format, up, hidden), (layer.ffn_format, hidden, layer.ffn)]
    return sum(n * k / group_for(form.group_size, k) for form, n, k in matrices if form.is_integer) / 1e6


def proxy(candidate: AnyCandidate, shape: AnyShape) -> float:
    """Parameters x bits of either kind of candidate."""
    if isinstance(shape, ModuleShape):
        assert isinstance(candidate, ModuleCandidate)
        return sum(n * choice.format.bits for n, choice in zip(candidate.weights(shape), candidate.groups, strict=True))
    assert isinstance(candidate, Candidate)
    return params_times_bits(candidate, shape)


def _module_terms(candidate: ModuleCandidate, shape: ModuleShape) -> Array:
    """Of a module: a constant, multiply-adds (millions) per group, and weights (millions) that are dequantized per precision."""
    dequantized = {8: 0.0, 4: 0.0}
    for n, choice in zip(candidate.weights(shape), candidate.groups, strict=True):
        if choice.format.bits in dequantized:
            dequantized[choice.format.bits] += n / 1e6
    return np.array([1.0, *(macs / 1e6 for macs in candidate.macs(shape)), *dequantized.values()])


class LatencyFit:
    """Predicts one quantity (`decode_ms_per_token` or `ttft_ms`) for candidates of one teacher on one machine."""

    def __init__(self, name: str, unit: str, shape: AnyShape, measured: list[tuple[AnyCandidate, float]]) -> None:
        if len(measured) < MIN_POINTS:
            raise ValueError(f"a latency fit needs at least {MIN_POINTS} measurements, but got {len(measured)}")
        self.name, self.unit, self.shape = name, unit, shape
        x, y = np.stack([terms(c, shape) for c, _ in measured]), np.array([v for _, v in measured])
        self.coefficients = _fit(x, y)
        self.error = _cross_validate(x, y, np.array([proxy(c, shape) for c, _ in measured]))

    def predict(self, candidate: AnyCandidate) -> Measurement:
        """Value and interval (held-out 95th percentile of the relative error)."""
        value = float(terms(candidate, self.shape) @ self.coefficients)
        spread = self.error.p95
        return Measurement(
            value,
            self.unit,
            value / (1 + spread),
            value * (1 + spread),
            "predicted",
            self.error.points,
            "",
            f"fit to this machine, held-out error {self.error.median:.1%} median, {self.error.worst:.1%} worst",
        )


def design(space: AnySpace, count: int, seed: int = 0) -> list[AnyCandidate]:
    """`count` dense candidates to measure for the fit: the baselines, then random ones with every choice about equally often."""
    found: dict[str, AnyCandidate] = {c.key: c for c in space.baselines()}
    generator = random.Random(seed)
    ranges = space.distributions()
    columns = {name: _shuffled(kind, count * 2, generator) for name, kind in ranges.items()}
    for row in range(count * 2):
        params = {name: column[row] for name, column in columns.items()}
        candidate = space.decode(params | {"pattern": "none", "quantizer": "rtn", "precision_mode": "uniform"})
        if len(found) < count:
            found.setdefault(candidate.key, candidate)
    return list(found.values())


def _shuffled(kind: tuple[str, object], rows: int, generator: random.Random) -> list[object]:
    """Each value of a variable about equally often, in random order (one column of a Latin hypercube)."""
    bounds = kind[1]
    assert isinstance(bounds, tuple)
    values = list(range(bounds[0], bounds[1] + 1)) if kind[0] == "int" else list(bounds)
    column = [values[i % len(values)] for i in range(rows)]
    generator.shuffle(column)
    return column


def _fit(x: Array, y: Array) -> Array:
    """Non-negative least squares on relative errors."""
    from scipy.optimize import nnls  # late: a tenth of a second that `recommend` need not pay

    coefficients, _ = nnls(x / y[:, None], np.ones_like(y))
    return np.asarray(coefficients)


def _cross_validate(x: Array, y: Array, proxy: Array) -> FitError:
    from scipy.stats import kendalltau

    order = np.random.default_rng(0).permutation(len(y))
    predicted = np.empty_like(y)
    for fold in np.array_split(order, min(FOLDS, len(y))):
        rest = np.setdiff1d(order, fold)
        predicted[fold] = x[fold] @ _fit(x[rest], y[rest])
    errors = np.abs(predicted / y - 1)
    return FitError(
        float(np.median(errors)),
        float(errors.max()),
        float(np.quantile(errors, 0.95)),
        float(kendalltau(predicted, y).statistic),
        float(kendalltau(proxy, y).statistic),
        len(y),
    )
