"""What both pictures of the front draw: groups of points, their place, colour and size, and the line of the front.

Hollow and faint is an estimate of rung 0, solid is confirmed by measurement; colour and size are compressed bytes. The
colours are of middle lightness, because the page is read on white and on black.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paretune.objectives.directions import minimized
from paretune.objectives.energy import COST, ENERGY, THROUGHPUT
from paretune.objectives.metric_names import DECODER, MetricNames
from paretune.objectives.units import BYTES, drawn_in
from paretune.search.front import non_dominated
from paretune.search.recommend.recommend import Recommendation
from paretune.search.study.view import Point, StudyView, label_of
from paretune.tracking.wording import is_disturbed, measurement

AXES = (
    ("decode_ms_per_token", "nll"),
    ("ttft_ms", "nll"),
    ("compressed_bytes", "nll"),
    ("peak_memory_bytes", "nll"),
    ("decode_ms_per_token", "compressed_bytes"),
    ("ttft_ms", "compressed_bytes"),
)
SIZE_SCALE = ((0.0, "#2f7fe0"), (0.5, "#b83fb5"), (1.0, "#ee7b1c"))
ACCENT, GOLD, GREY, RED = "#12a37a", "#f2b50c", "#808890", "#d9453d"
STAIRCASE = "reached by the front in these two axes"
SMALLEST, LARGEST = 8.0, 19.0
HEADROOM = 0.4

GroupName = Literal[
    "estimated (rung 0)", "confirmed, dominated", "front", "front, tied", "teacher, unchanged", "disturbed, not ranked"
]


@dataclass(frozen=True)
class Group:
    """Points that are drawn alike. `symbol` is plotly's name, `marker` matplotlib's."""

    name: GroupName
    points: tuple[Point, ...]
    symbol: str
    marker: str
    opacity: float
    edge: str


STYLES: dict[GroupName, tuple[str, str, float, str]] = {
    "estimated (rung 0)": ("circle-open", "o", 0.6, GREY),
    "disturbed, not ranked": ("x-thin", "x", 0.9, RED),
    "confirmed, dominated": ("circle", "o", 0.6, GREY),
    "teacher, unchanged": ("diamond", "D", 1.0, GREY),
    "front, tied": ("circle-dot", "h", 1.0, ACCENT),
    "front": ("circle", "o", 1.0, ACCENT),
}


def axes_of(figures: MetricNames) -> tuple[tuple[str, str], ...]:
    """The pairs (x, y) that a chart offers, the first of which it shows first."""
    if figures.is_decoder:
        return AXES
    x, y = figures.latency, figures.quality
    return (x, y), ("compressed_bytes", y), ("peak_memory_bytes", y), (x, "compressed_bytes")


def menu_axes(view: StudyView) -> tuple[tuple[str, str], ...]:
    """The pairs of axes of a study's menu: with energy and cost where they are known, and every objective."""
    pairs = axes_of(view.figures)
    known = {name for p in view.confirmed for name in p.measurements}
    wanted = [
        name for name in (ENERGY, COST, THROUGHPUT) if name in known and (name != THROUGHPUT or name in view.objectives)
    ]
    return *pairs, *((name, view.figures.quality) for name in wanted)


def first_axes(shown: StudyView | Point | Group | Recommendation | None) -> tuple[str, str]:
    """The pair of axes that a picture starts with."""
    if isinstance(shown, Group):
        return first_axes(shown.points[0] if shown.points else None)
    if isinstance(shown, Recommendation):
        return first_axes(shown.chosen)
    return axes_of(DECODER if shown is None else shown.figures)[0]


def groups(view: StudyView) -> list[Group]:
    """Every point in exactly one group, faint ones first so that the front is drawn on top."""
    members: dict[GroupName, list[Point]] = {name: [] for name in STYLES}
    for point in (*view.rung0, *view.confirmed):
        members[_group_name(view, point)].append(point)
    return [Group(name, tuple(members[name]), *style) for name, style in STYLES.items()]


def _group_name(view: StudyView, point: Point) -> GroupName:
    if point.kind == "rung0":
        return "estimated (rung 0)"
    if point.source == "baseline":
        return "teacher, unchanged"
    if any(p.key == point.key for p in view.front):
        return "front, tied" if point.key in view.ties else "front"
    return "disturbed, not ranked" if is_disturbed(view, point) else "confirmed, dominated"


def staircase(view: StudyView, x: str, y: str) -> list[tuple[float, float]]:
    """Corners of what the front reaches in two axes, in drawing units, best x first: the members that no other beats in both."""
    pairs = [(scaled(p, x), scaled(p, y)) for p in view.front]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    turned = [(minimized(x, a), minimized(y, b)) for a, b in known]
    corners = {known[i] for i in non_dominated(turned)}
    return sorted(corners, key=lambda corner: minimized(x, corner[0]))


def window(view: StudyView, y: str) -> tuple[float, float] | None:
    """Range of the y axis that shows the confirmed points and the estimates near them; None lets the chart decide.

    Without it one hopeless estimate squeezes the front into a line; a double click shows everything.
    """
    found = [m for p in view.confirmed if (m := measurement(p, y)) is not None]
    if y != view.figures.quality or len(found) < 2:
        return None
    estimates = [m.value for p in view.rung0 if (m := measurement(p, y)) is not None]
    low, high = min(m.low for m in found), max(m.high for m in found)
    span = (high - low) or 0.1 * abs(high)
    top = min(max([high, *estimates]), high + HEADROOM * span)
    bottom = max(min([low, *estimates]), low - HEADROOM * span)
    return bottom - 0.06 * span, top + 0.06 * span


def hidden_estimates(view: StudyView) -> int:
    """How many rung-0 points the first view leaves outside its window."""
    quality = view.figures.quality
    shown = window(view, quality)
    values = [m.value for p in view.rung0 if (m := measurement(p, quality)) is not None]
    return 0 if shown is None else sum(not shown[0] <= v <= shown[1] for v in values)


def scaled(point: Point, name: str) -> float | None:
    """A measurement in the unit it is drawn in (bytes in MB), None where this fidelity has none."""
    m = measurement(point, name)
    return None if m is None else m.value / drawn_in(name)


def title(name: str, figures: MetricNames = DECODER) -> str:
    """What an axis says."""
    label = label_of(name, figures)
    return label.replace("(bytes)", "(MB)") if name in BYTES else label


def _megabytes(points: Sequence[Point]) -> list[float]:
    """Compressed size, which decides colour and area; 0 where it is not known."""
    return [scaled(p, "compressed_bytes") or 0.0 for p in points]


def bounds(view: StudyView) -> tuple[float, float]:
    """Smallest and largest compressed MB that are drawn."""
    values = [v for v in _megabytes([*view.rung0, *view.confirmed]) if v > 0] or [1.0]
    return min(values), max(values)


def _fractions(view: StudyView, points: Sequence[Point]) -> list[float]:
    """Compressed size from 0 (smallest) to 1 (largest) on a logarithmic scale: fp32 would leave all others one colour."""
    low, high = bounds(view)
    span = math.log(high / low) or 1.0
    return [math.log(max(v, low) / low) / span for v in _megabytes(points)]


def diameters(view: StudyView, points: Sequence[Point]) -> list[float]:
    """Marker diameters in pixels."""
    return [SMALLEST + (LARGEST - SMALLEST) * fraction for fraction in _fractions(view, points)]


def colours_of(view: StudyView, points: Sequence[Point]) -> list[str]:
    """`#rrggbb` per point; spelled out because plotly's legend does not resolve colour scales."""
    return [_blend(fraction) for fraction in _fractions(view, points)]


def _blend(fraction: float) -> str:
    """A colour of SIZE_SCALE between its stops."""
    (start, first), (end, second) = SIZE_SCALE[:2] if fraction <= SIZE_SCALE[1][0] else SIZE_SCALE[1:]
    weight = (fraction - start) / (end - start)
    pairs = zip(bytes.fromhex(first[1:]), bytes.fromhex(second[1:]), strict=True)
    return "#" + "".join(f"{round(a + weight * (b - a)):02x}" for a, b in pairs)


def size_ticks(view: StudyView) -> list[float]:
    """Round MB values within the bounds for the colour bar."""
    low, high = bounds(view)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low > 3 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    return [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high] or [low]


def baseline_label(point: Point) -> str:
    """What stands beside a baseline."""
    return point.name.removeprefix("teacher ")


def is_below(point: Point) -> bool:
    """Whether a baseline's label goes below it, not above: int8 and int4 are close together."""
    return baseline_label(point) == "int8"


def column(group: Group, name: str) -> list[float | None]:
    """A group in one axis."""
    return [scaled(p, name) for p in group.points]


def whiskers(group: Group, name: str) -> dict[str, Any]:
    """Distances from the value to the ends of its interval."""
    found = [measurement(p, name) for p in group.points]
    unit = drawn_in(name)
    up = [0.0 if m is None else (m.high - m.value) / unit for m in found]
    down = [0.0 if m is None else (m.value - m.low) / unit for m in found]
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "thickness": 1,
        "width": 3,
        "color": group.edge,
    }
