"""From a rung-0 value to what recovery will make of it: a small ridge regression, refitted as confirmations come in.

Rung 0 scores a candidate without recovery, and recovery repairs some things (sparsity, small students) more than others.
Before any confirmation the estimate is the rung-0 value itself; every pair pulls it towards what was observed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paretune.spaces.candidate import Candidate, Shape
from paretune.spaces.kinds import AnyCandidate, AnyShape
from paretune.spaces.module_candidate import ModuleCandidate, ModuleShape

RIDGE = 0.3
MIN_PAIRS = 4
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """NLL increase over the teacher in nats/token: at rung 0 (search split) and confirmed (report split)."""

    candidate: AnyCandidate
    rung0: float
    confirmed: float


class Calibration:
    """Estimates the confirmed increase from the rung-0 increase, pattern, precision and size."""

    def __init__(self, shape: AnyShape, pairs: list[Pair]) -> None:
        self.shape, self.pairs = shape, len(pairs)
        self.coefficients = np.zeros(_features_of(shape, None, 0.0).size)
        self.median_error = self.prior_error = float("nan")
        if pairs:
            self.prior_error = float(np.median([abs(p.rung0 - p.confirmed) for p in pairs]))
        if len(pairs) >= MIN_PAIRS:
            x, y = _design(shape, pairs)
            self.coefficients = _ridge(x, y)
            rest = [np.delete(np.arange(len(pairs)), i) for i in range(len(pairs))]
            self.median_error = float(
                np.median([abs(float(x[i] @ _ridge(x[r], y[r])) - y[i]) for i, r in enumerate(rest)])
            )

    def estimate(self, candidate: AnyCandidate, rung0: float) -> float:
        """Estimated confirmed NLL increase in nats/token."""
        return rung0 + float(_features_of(self.shape, candidate, rung0) @ self.coefficients)

    @property
    def error(self) -> float:
        """Median absolute error in nats/token: leave-one-out once fitted, of the plain rung-0 value before; NaN without pairs."""
        return self.prior_error if np.isnan(self.median_error) else self.median_error

    def to_dict(self) -> dict[str, float]:
        """Return the number of pairs and the median errors; each name ends in the error's unit, nats or fraction."""
        unit = "fraction" if isinstance(self.shape, ModuleShape) else "nats"
        return {
            "pairs": self.pairs,
            f"median_error_{unit}": self.error,
            f"median_error_uncalibrated_{unit}": self.prior_error,
        }


def _features(shape: Shape, candidate: Candidate | None, rung0: float) -> Array:
    """What the correction depends on: level, rung-0 value (bent), sparsity, weights of 4 bits or fewer (GPTQ and clipping have repaired
    beforehand what training under the rounding would), how much was cut away."""
    if candidate is None:
        return np.zeros(7)
    first = candidate.layers[0]
    layers = candidate.layers
    formats = [*(f for x in layers for f in (x.attention_format, x.ffn_format)), *[candidate.head_format] * len(layers)]
    kept = len(candidate.layers) / shape.layers * (first.ffn / shape.ffn + first.kv_groups / shape.kv_heads) / 2
    kept *= candidate.width(shape) / shape.hidden
    return np.array(
        [
            0.1,
            rung0 / (1 + rung0),
            first.pattern.ratio * rung0,
            float(first.pattern.kind == "2:4") * 0.3,
            sum(f.bits <= 4 for f in formats) / len(formats) * 0.3,
            sum(f.algorithm != "rtn" for f in formats) / len(formats) * 0.3,
            (1 - kept) * 0.5,
        ]
    )


def _features_of(shape: AnyShape, candidate: AnyCandidate | None, rung0: float) -> Array:
    """The features of either kind of candidate."""
    if isinstance(shape, ModuleShape):
        assert candidate is None or isinstance(candidate, ModuleCandidate)
        return _module_features(shape, candidate, rung0)
    assert candidate is None or isinstance(candidate, Candidate)
    return _features(shape, candidate, rung0)


def _module_features(shape: ModuleShape, candidate: ModuleCandidate | None, rung0: float) -> Array:
    """As for decoders, by the groups' shares of the weights; losses are fractions of the teacher's own quality."""
    if candidate is None:
        return np.zeros(5)
    total = sum(group.weights for group in shape.groups) or 1
    shares = [group.weights / total for group in shape.groups]
    chosen = list(zip(shares, candidate.groups, strict=True))
    sparse = sum(share * choice.pattern.ratio for share, choice in chosen)
    low = sum(share for share, choice in chosen if choice.format.bits < 8)
    kept = sum(candidate.weights(shape)) / total
    return np.array([0.1, rung0 / (1 + abs(rung0)), sparse * rung0, low * 0.3, (1 - kept) * 0.5])


def _design(shape: AnyShape, pairs: list[Pair]) -> tuple[Array, Array]:
    return (
        np.stack([_features_of(shape, p.candidate, p.rung0) for p in pairs]),
        np.array([p.confirmed - p.rung0 for p in pairs]),
    )


def _ridge(x: Array, y: Array) -> Array:
    """Ridge with relative weights: an error of 0.05 nats matters more near the front than far from it."""
    weights = 1 / (0.1 + np.abs(y))
    xw, yw = x * weights[:, None], y * weights
    return np.asarray(np.linalg.solve(xw.T @ xw + RIDGE * np.eye(x.shape[1]), xw.T @ yw))
