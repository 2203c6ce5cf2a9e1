"""Peak memory before it is measured: a straight line over what the confirmed candidates' files take in memory.

The engine's process holds the weights (once or twice, with its kernels' packing), the graph and its buffers. The baselines
are confirmed first, so there are three points from the start; every confirmation sharpens the line.
"""

from __future__ import annotations

import numpy as np

from paretune.hardware_profiles.kernels import STORAGE_ONLY
from paretune.objectives.measurement import Measurement
from paretune.spaces.candidate import Candidate, Format
from paretune.spaces.kinds import AnyCandidate, AnyShape
from paretune.spaces.module_candidate import ModuleShape

LEAST_ERROR = 0.1
WIDE = 0.5  # of a line through fewer than three points, whose error cannot be seen


def resident_bytes(candidate: AnyCandidate, shape: AnyShape, file_bytes: float) -> float:
    """Bytes of the weights once loaded: those of the file, and of 16-bit matrices (which are only stored so) their fp32 copy."""
    if isinstance(shape, ModuleShape) or not isinstance(candidate, Candidate):
        return file_bytes
    hidden = candidate.width(shape)
    extra = 0.0
    for layer in candidate.layers:
        width = layer.kv_groups * shape.head_dim * (shape.heads_per_group + 1)
        extra += 2 * hidden * width * _widened(layer.attention_format)
        extra += shape.ffn_matrices * hidden * layer.ffn * _widened(layer.ffn_format)
    return file_bytes + extra + shape.vocab * hidden * _widened(candidate.head_format)


def _widened(form: Format) -> float:
    """Bytes per weight that loading adds."""
    return 4 - form.bits / 8 if form.kernel in STORAGE_ONLY else 0.0


class MemoryFit:
    """`points`: (resident bytes, measured peak) of confirmed candidates; at least one."""

    def __init__(self, points: list[tuple[float, float]]) -> None:
        if not points:
            raise ValueError("a memory fit needs at least 1 measurement, but got 0")
        self.points = len(points)
        self._line = _line(points)
        self.error = WIDE if self.points < 3 else max(LEAST_ERROR, _held_out(points))

    def predict(self, resident: float) -> Measurement:
        """Peak bytes; the interval is the worst held-out error, at least 10 %."""
        value = _at(self._line, resident)
        note = f"line through {self.points} confirmed candidates"
        low, high = value / (1 + self.error), value * (1 + self.error)
        return Measurement(value, "bytes", low, high, "predicted", self.points, "", note)


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Constant and slope, neither negative, by least relative squares."""
    from scipy.optimize import nnls

    x, y = (np.array(values, np.float64) for values in zip(*points, strict=True))
    scale = float(x.max()) or 1.0
    found, _ = nnls(np.stack([1 / y, x / scale / y], 1), np.ones(len(points)))
    return float(found[0]), float(found[1]) / scale


def _at(line: tuple[float, float], resident: float) -> float:
    return line[0] + line[1] * resident


def _held_out(points: list[tuple[float, float]]) -> float:
    """Worst relative error of a point by the line through the others."""
    errors = []
    for i, (x, y) in enumerate(points):
        rest = points[:i] + points[i + 1 :]
        errors.append(abs(_at(_line(rest), x) / y - 1))
    return max(errors)
