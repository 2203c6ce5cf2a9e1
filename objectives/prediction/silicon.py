"""Measured times of matrix products on NVIDIA data-centre GPUs, from the tables of `aiconfigurator-core` (pip install "paretune[nvidia]").

The package carries what NVIDIA measured on those chips: milliseconds of M x K by K x N products per precision, in TensorRT-LLM, vLLM
and SGLang. A product that lies inside a table takes its time from there instead of from a roofline; everything else of a step
(attention, norms, the embedding) keeps its roofline. At few rows a product's time hangs on the bytes of its weights, so a table
is read by M and by N·K: the median over shapes of like N·K, with their spread as interval. Nothing is extrapolated.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from paretune.hardware_profiles.schema import Profile
from paretune.objectives.prediction.roofline import FusedOp, Milliseconds

PACKAGE = "aiconfigurator_core"
SYSTEMS = {"nvidia-a100": "a100_sxm", "nvidia-h100": "h100_sxm"}
FRAMEWORKS = ("trtllm", "vllm", "sglang")
PRODUCTS = frozenset({"qkv", "o", "gate_up", "up", "down", "head"})
# What the tables call a pair of weights and activations.
DTYPES = {
    "fp16/fp32": "bfloat16",
    "bf16/fp32": "bfloat16",
    "int8/fp32": "int8_wo",
    "int4/fp32": "int4_wo",
    "int8/dynamic": "sq",
    "int8/static": "sq",
}
LIKE = 1.05  # shapes whose N·K differ by less count as alike
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Milliseconds over log(N·K) at one M: low, median and high of like shapes, each row sorted by N·K."""

    area: Array
    low: Array
    likely: Array
    high: Array

    def at(self, area: float) -> tuple[float, float, float] | None:
        """Interpolated in logarithms; None outside of what was measured."""
        x = float(np.log(area))
        if not self.area[0] <= x <= self.area[-1]:
            return None
        low, likely, high = (
            float(np.exp(np.interp(x, self.area, np.log(v)))) for v in (self.low, self.likely, self.high)
        )
        return low, likely, high


@dataclass(frozen=True)
class Tables:
    """Curves by what the tables call a precision, then by M; `source` names package, system and frameworks."""

    curves: dict[str, dict[int, Curve]]
    source: str

    def time_of(self, work: FusedOp, rows: int) -> Milliseconds | None:
        """A product's time, or None for what the tables do not cover."""
        curves = self.curves.get(DTYPES.get(work.kernel, ""), {})
        if work.name not in PRODUCTS or work.speedup[1] != 1.0 or not curves:
            return None
        below = max((m for m in curves if m <= rows), default=None)
        above = min((m for m in curves if m >= rows), default=None)
        if below is None or above is None:
            return None
        area = work.flops / (2 * rows)
        first, second = curves[below].at(area), curves[above].at(area)
        if first is None or second is None:
            return None
        share = 0.0 if below == above else float(np.log(rows / below) / np.log(above / below))
        low, likely, high = (float(a ** (1 - share) * b**share) for a, b in zip(first, second, strict=True))
        return Milliseconds(low, likely, high)


def tables_of(profile: Profile) -> Tables | None:
    """The tables of a profile's chip; None where the package has none or is not installed."""
    system = SYSTEMS.get(profile.name)
    spec = None if system is None else importlib.util.find_spec(PACKAGE)
    if system is None or spec is None or not spec.submodule_search_locations:
        return None
    return _read(Path(next(iter(spec.submodule_search_locations))), system)


@lru_cache(maxsize=4)
def _read(package: Path, system: str) -> Tables | None:
    import pandas as pd

    curves: dict[str, dict[int, Curve]] = {}
    used = []
    for framework in FRAMEWORKS:
        files = sorted((package / "systems" / "data" / system / "gemm" / framework).glob("*/gemm_perf.parquet"))
        if not files:
            continue
        table = pd.read_parquet(files[-1], columns=["gemm_dtype", "m", "n", "k", "latency"])
        table = table[(table["latency"] > 0) & table["gemm_dtype"].isin(set(DTYPES.values()) - curves.keys())]
        for dtype, rows in table.groupby("gemm_dtype"):
            curves[str(dtype)] = {int(str(m)): _curve(group) for m, group in rows.groupby("m")}
        used.append(f"{framework} {files[-1].parent.name}")
    return Tables(curves, f"aiconfigurator-core {_version()}, {system}, {', '.join(used)}") if curves else None


def _curve(rows: object) -> Curve:
    """One M: like N·K together."""
    import pandas as pd

    assert isinstance(rows, pd.DataFrame)
    area = np.log(rows["n"].to_numpy(float) * rows["k"].to_numpy(float))
    bins = pd.Series(rows["latency"].to_numpy(float)).groupby(np.round(area / np.log(LIKE)))
    low, likely, high = (bins.quantile(q) for q in (0.05, 0.5, 0.95))
    place = likely.index.to_numpy(float) * np.log(LIKE)
    return Curve(place, low.to_numpy(float), likely.to_numpy(float), high.to_numpy(float))


def _version() -> str:
    try:
        return version("aiconfigurator-core")
    except PackageNotFoundError:
        return "unknown"
