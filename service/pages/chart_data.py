"""A study's points as the page's chart takes them: columns of numbers, with intervals where they are confirmed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paretune.objectives.directions import MAXIMIZED, minimized
from paretune.objectives.units import BYTES, drawn_in
from paretune.search.front import non_dominated
from paretune.search.study.view import Point, StudyView, label_of
from paretune.tracking.wording import is_disturbed, measurement, recommended, told

MOST_DRAWN = 1500
MEGA = 1e6


def chart_data(view: StudyView, profile: str, kept: bool) -> dict[str, Any]:
    """Axes with labels, the confirmed points, at most MOST_DRAWN estimates (those that nothing dominates, then evenly chosen
    ones in the order of their proposal), and the key of the recommendation without limits. Bytes are in MB."""
    names = axes_of(view)
    drawn = drawn_estimates(view)
    best = recommended(view)
    return {
        "study": view.study,
        "profile": profile,
        "kept": kept,
        "axes": [{"name": name, "label": _label(view, name), "maximized": name in MAXIMIZED} for name in names],
        "objectives": list(view.objectives),
        "quality": view.figures.quality,
        "latency": view.figures.latency,
        "recommended": None if best is None else best.chosen.key,
        "confirmed": [_confirmed(view, p, names) for p in view.confirmed],
        "estimates": {
            "total": len(view.rung0),
            "drawn": len(drawn),
            "keys": [p.key for p in drawn],
            "names": [p.name for p in drawn],
            "values": {name: [_value(p, name) for p in drawn] for name in names},
        },
    }


def axes_of(view: StudyView) -> list[str]:
    """Measurements that an axis can show: the objectives first, then what else every confirmed point has."""
    names = [*view.objectives, *(n for n in told(view.figures) if n not in view.objectives)]
    more = ("throughput_tokens_per_s", "energy_j_per_token", "usd_per_million_tokens", "load_ms")
    names += [n for n in more if n not in names]
    points = view.confirmed or view.rung0
    return [n for n in names if points and all(measurement(p, n) is not None for p in points)]


def drawn_estimates(view: StudyView) -> list[Point]:
    """What of rung 0 is drawn."""
    if len(view.rung0) <= MOST_DRAWN:
        return list(view.rung0)
    first = view.objectives[:2]
    vectors = [tuple(_least(p, name) for name in first) for p in view.rung0]
    chosen = set(non_dominated(vectors)[:MOST_DRAWN])
    step = len(view.rung0) / (MOST_DRAWN - len(chosen) or 1)
    chosen |= {int(i * step) for i in range(MOST_DRAWN - len(chosen))}
    return [view.rung0[i] for i in sorted(chosen)]


def slider_ranges(view: StudyView) -> list[dict[str, Any]]:
    """Limits that a page offers: parameter of the recommendation, label, least and greatest value on the front, in page units."""
    wanted: Sequence[tuple[str, str, float]] = (
        ("max_loss", "relative_loss", 0.01),
        ("max_latency_ms", view.figures.latency, 1.0),
        ("max_bytes", "compressed_bytes", MEGA),
        ("max_memory_bytes", "peak_memory_bytes", MEGA),
    )
    units = {"relative_loss": "%", "compressed_bytes": "MB", "peak_memory_bytes": "MB"}
    found = []
    for parameter, name, scale in wanted:
        values = [m.value / scale for p in view.front if (m := measurement(p, name)) is not None]
        if len(values) >= 2 and len(values) == len(view.front) and max(values) > max(min(values), 0.0):
            low = max(min(values), max(values) / 1000)
            unit = units.get(name, "ms")
            found.append(
                {
                    "parameter": parameter,
                    "label": _plain_label(view, name),
                    "unit": unit,
                    "scale": scale,
                    "low": low,
                    "high": max(values),
                }
            )
    return found


def _confirmed(view: StudyView, point: Point, names: Sequence[str]) -> dict[str, Any]:
    return {
        "key": point.key,
        "name": point.name,
        "description": point.description,
        "baseline": point.source == "baseline",
        "front": any(p.key == point.key for p in view.front),
        "tied": view.ties.get(point.key),
        "disturbed": is_disturbed(view, point),
        "values": {name: _interval(point, name) for name in names},
    }


def _interval(point: Point, name: str) -> list[Any] | None:
    m = measurement(point, name)
    if m is None:
        return None
    scale = drawn_in(name)
    return [m.value / scale, m.low / scale, m.high / scale, m.provenance]


def _value(point: Point, name: str) -> float | None:
    m = measurement(point, name)
    return None if m is None else m.value / drawn_in(name)


def _least(point: Point, name: str) -> float:
    m = measurement(point, name)
    return float("inf") if m is None else minimized(name, m.value)


def _label(view: StudyView, name: str) -> str:
    label = label_of(name, view.figures)
    return label.replace("(bytes)", "(MB)") if name in BYTES else label


def _plain_label(view: StudyView, name: str) -> str:
    return {
        "relative_loss": "loss against the teacher",
        "compressed_bytes": "size, compressed",
        "peak_memory_bytes": "peak memory",
    }.get(name, label_of(name, view.figures).partition(" (")[0])
