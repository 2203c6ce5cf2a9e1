"""Numbers, names and the answer of a study in words, the same in every chart, page and run."""

from __future__ import annotations

from typing import Any

from paretune.common.errors import NothingFeasible
from paretune.objectives import units
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import MetricNames
from paretune.search.recommend.recommend import Limits, Recommendation, recommend
from paretune.search.study.view import Point, StudyView

SHORT = {
    "nll": "NLL",
    "relative_loss": "loss vs teacher",
    "decode_ms_per_token": "decode",
    "ttft_ms": "TTFT",
    "throughput_tokens_per_s": "throughput",
    "energy_j_per_token": "energy",
    "usd_per_million_tokens": "cost",
    "compressed_bytes": "compressed",
    "bytes": "uncompressed",
    "peak_memory_bytes": "peak memory",
    "forward_ms": "forward",
}


def short_of(name: str) -> str:
    """A measurement in a word or two."""
    return SHORT.get(name, name.replace("_", " "))


def told(figures: MetricNames) -> tuple[str, ...]:
    """What is told of every candidate, in the order of columns: quality, loss, times, sizes, further qualities."""
    times = tuple(name for name, _ in figures.latencies)
    return (figures.quality, "relative_loss", *times, "compressed_bytes", "peak_memory_bytes", *figures.others)


def headline(view: StudyView) -> str:
    """Which study, for which machine, how many points."""
    counts = f"{len(view.front)} of {len(view.confirmed)} confirmed on the front"
    return f"{view.study} on {named(view.meta.get('profile'))}: {counts}"


def recommended(view: StudyView) -> Recommendation | None:
    """The recommendation without limits; None before the first confirmation."""
    try:
        return recommend(view, Limits())
    except NothingFeasible:
        return None


def named(value: Any, otherwise: str = "unknown") -> str:
    """The name of a profile or teacher, which the store holds as text or as a mapping with `name`."""
    return str((value.get("name") if isinstance(value, dict) else value) or otherwise)


def measurement(point: Point, name: str) -> Measurement | None:
    """A point's measurement, None where this fidelity has none (a rung-0 point has no peak memory)."""
    quality = point.figures.quality
    if name == quality and point.kind == "rung0":
        return point.measurements.get(point.figures.estimate)
    if name == quality and quality in point.measurements:
        return point.value(quality)  # its interval is the paired one
    return point.measurements.get(name)


def plain(name: str, value: float, unit: str = "") -> str:
    """A value with its unit, bytes in MB, a loss with its sign."""
    return units.plain(name, value, unit, signed=True, digits=4)


def with_interval(name: str, m: Measurement | None) -> str:
    """`2.164 [2.101, 2.229]`; the value alone where it was counted, a dash where there is none."""
    if m is None:
        return "–"
    if m.low == m.high:
        return plain(name, m.value, m.unit)
    return f"{plain(name, m.value, m.unit)} [{plain(name, m.low, m.unit)}, {plain(name, m.high, m.unit)}]"


def is_disturbed(view: StudyView, point: Point) -> bool:
    """Whether an objective was measured while something else used the machine."""
    found = (measurement(point, name) for name in view.objectives)
    return any(m is not None and m.provenance == "disturbed" for m in found)
