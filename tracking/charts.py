"""The front as a picture: interactive (plotly) and as a file (matplotlib). Both draw the same groups of points.

Hollow and faint is an estimate of rung 0, solid is confirmed by measurement; colour and size are compressed bytes. The
colours are of middle lightness, because the page is read on white and on black.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paretune.hardware_profiles.errors import NothingFeasible
from paretune.hardware_profiles.files import write_atomically
from paretune.objectives.measurement import Measurement
from paretune.search.front import non_dominated
from paretune.search.recommend import Limits, Recommendation, recommend
from paretune.search.view import LABELS, Point, StudyView

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AXES = (
    ("decode_ms_per_token", "nll"),
    ("ttft_ms", "nll"),
    ("compressed_bytes", "nll"),
    ("peak_memory_bytes", "nll"),
    ("decode_ms_per_token", "compressed_bytes"),
    ("ttft_ms", "compressed_bytes"),
)
HOVER = ("nll", "relative_loss", "decode_ms_per_token", "ttft_ms", "compressed_bytes", "peak_memory_bytes")
SHORT = {
    "nll": "NLL",
    "relative_loss": "loss vs teacher",
    "decode_ms_per_token": "decode",
    "ttft_ms": "TTFT",
    "compressed_bytes": "compressed",
    "bytes": "uncompressed",
    "peak_memory_bytes": "peak memory",
}
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


def front_figure(view: StudyView) -> Figure:
    """The interactive front: NLL over decode at first, a menu changes the axes. Legible on light and dark pages."""
    import plotly.graph_objects as go

    drawn, chosen = groups(view), recommended(view)
    traces = [_staircase(view, *AXES[0]), *(_trace(view, group) for group in drawn), _star(chosen), _scale(view)]
    figure = go.Figure(traces)
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 13},
        height=680,
        margin={"l": 70, "r": 16, "t": 92, "b": 56},
        hovermode="closest",
        coloraxis=_colour_axis(view),
        legend={"orientation": "h", "x": 0, "y": -0.12, "yanchor": "top"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": ACCENT},
        updatemenus=[_axis_menu(view, drawn, chosen)],
        **_axis_layout(view, *AXES[0]),
    )
    line = {
        "gridcolor": "rgba(128,136,144,0.22)",
        "zeroline": False,
        "linecolor": GREY,
        "showline": True,
        "ticks": "outside",
        "automargin": True,
    }
    figure.update_xaxes(**line)
    figure.update_yaxes(**line)
    return figure


def front_png(view: StudyView, path: Path) -> None:
    """NLL over decode as a PNG of 1200 x 800 pixels, written atomically."""
    write_atomically(path, _draw(view))


def figure_html(view: StudyView) -> str:
    """The interactive front as a page of its own, plotly.js inlined."""
    return str(front_figure(view).to_html(include_plotlyjs=True, config=PLOTLY_CONFIG))


# plotly.js 4 shows a button that uploads the chart to its maker's cloud unless it is told not to.
PLOTLY_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["lasso2d", "select2d"],
    "showSendToCloud": False,
    "plotlyServerURL": "",
}


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
    if name == "nll" and point.kind == "rung0":
        return point.measurements.get("estimated_nll")
    if name == "nll" and "nll" in point.measurements:
        return point.value("nll")  # its interval is the paired one
    return point.measurements.get(name)


def plain(name: str, value: float) -> str:
    """A value with its unit, bytes in MB."""
    if name.endswith("bytes"):
        return f"{value / 1e6:.2f} MB"
    if name == "relative_loss":
        return f"{value:+.1%}"
    return f"{value:.3f}" + (" ms" if "ms" in name.split("_") else "")


def with_interval(name: str, m: Measurement | None) -> str:
    """`2.164 [2.101, 2.229]`; the value alone where it was counted, a dash where there is none."""
    if m is None:
        return "–"
    if m.low == m.high:
        return plain(name, m.value)
    return f"{plain(name, m.value)} [{plain(name, m.low)}, {plain(name, m.high)}]"


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


def is_disturbed(view: StudyView, point: Point) -> bool:
    """Whether an objective was measured while something else used the machine."""
    found = (measurement(point, name) for name in view.objectives)
    return any(m is not None and m.provenance == "disturbed" for m in found)


def staircase(view: StudyView, x: str, y: str) -> list[tuple[float, float]]:
    """Corners of what the front reaches in two axes, in drawing units: the members that no other beats in both."""
    pairs = [(_scaled(p, x), _scaled(p, y)) for p in view.front]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return sorted({known[i] for i in non_dominated(known)})


def window(view: StudyView, y: str) -> tuple[float, float] | None:
    """Range of the y axis that shows the confirmed points and the estimates near them; None lets the chart decide.

    Without it one hopeless estimate squeezes the front into a line; a double click shows everything.
    """
    found = [m for p in view.confirmed if (m := measurement(p, y)) is not None]
    if y != "nll" or len(found) < 2:
        return None
    estimates = [m.value for p in view.rung0 if (m := measurement(p, y)) is not None]
    low, high = min(m.low for m in found), max(m.high for m in found)
    span = (high - low) or 0.1 * high
    top = min(max([high, *estimates]), high + HEADROOM * span)
    bottom = max(min([low, *estimates]), low - HEADROOM * span)
    return bottom - 0.06 * span, top + 0.06 * span


def hidden_estimates(view: StudyView) -> int:
    """How many rung-0 points the first view leaves outside its window."""
    shown = window(view, "nll")
    values = [m.value for p in view.rung0 if (m := measurement(p, "nll")) is not None]
    return 0 if shown is None else sum(not shown[0] <= v <= shown[1] for v in values)


def _scaled(point: Point, name: str) -> float | None:
    m = measurement(point, name)
    return None if m is None else m.value / _unit(name)


def _unit(name: str) -> float:
    return 1e6 if name.endswith("bytes") else 1.0


def _title(name: str) -> str:
    return LABELS[name].replace("(bytes)", "(MB)")


def _megabytes(points: Sequence[Point]) -> list[float]:
    """Compressed size, which decides colour and area; 0 where it is not known."""
    return [_scaled(p, "compressed_bytes") or 0.0 for p in points]


def _bounds(view: StudyView) -> tuple[float, float]:
    """Smallest and largest compressed MB that are drawn."""
    values = [v for v in _megabytes([*view.rung0, *view.confirmed]) if v > 0] or [1.0]
    return min(values), max(values)


def _fractions(view: StudyView, points: Sequence[Point]) -> list[float]:
    """Compressed size from 0 (smallest) to 1 (largest) on a logarithmic scale: fp32 would leave all others one colour."""
    low, high = _bounds(view)
    span = math.log(high / low) or 1.0
    return [math.log(max(v, low) / low) / span for v in _megabytes(points)]


def _diameters(view: StudyView, points: Sequence[Point]) -> list[float]:
    """Marker diameters in pixels."""
    return [SMALLEST + (LARGEST - SMALLEST) * fraction for fraction in _fractions(view, points)]


def _colours(view: StudyView, points: Sequence[Point]) -> list[str]:
    """`#rrggbb` per point; spelled out because plotly's legend does not resolve colour scales."""
    return [_blend(fraction) for fraction in _fractions(view, points)]


def _blend(fraction: float) -> str:
    """A colour of SIZE_SCALE between its stops."""
    (start, first), (end, second) = SIZE_SCALE[:2] if fraction <= SIZE_SCALE[1][0] else SIZE_SCALE[1:]
    weight = (fraction - start) / (end - start)
    pairs = zip(bytes.fromhex(first[1:]), bytes.fromhex(second[1:]), strict=True)
    return "#" + "".join(f"{round(a + weight * (b - a)):02x}" for a, b in pairs)


def _size_ticks(view: StudyView) -> list[float]:
    """Round MB values within the bounds for the colour bar."""
    low, high = _bounds(view)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low > 3 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    return [step * 10.0**e for e in exponents for step in steps if low <= step * 10.0**e <= high] or [low]


def _hover(view: StudyView, point: Point) -> str:
    state = "estimated" if point.kind == "rung0" else _standing(view, point)
    lines = [f"<b>{html.escape(point.name)}</b> {point.key[:8]} · {state}", html.escape(point.description)]
    for name in HOVER:
        m = measurement(point, name)
        if m is not None:
            lines.append(f"{SHORT[name]}: {with_interval(name, m)} ({m.provenance})")
    return "<br>".join(lines)


def _standing(view: StudyView, point: Point) -> str:
    if is_disturbed(view, point):
        return "confirmed, latency disturbed: not ranked"
    if point.key in view.ties:
        return f"on the front, tied with {view.ties[point.key][:8]}"
    return "on the front" if any(p.key == point.key for p in view.front) else "confirmed, dominated"


def _trace(view: StudyView, group: Group) -> Any:
    import plotly.graph_objects as go

    estimated = group.name == "estimated (rung 0)"
    x, y = AXES[0]
    labels = [_baseline_label(p) for p in group.points] if group.name == "teacher, unchanged" else None
    sides = ["bottom right" if _is_below(p) else "top left" for p in group.points]
    edge = {"width": 2.5 if group.edge != GREY else 1.2, "color": group.edge}
    return go.Scatter(
        x=_column(group, x),
        y=_column(group, y),
        name=f"{group.name} ({len(group.points)})",
        opacity=group.opacity,
        mode="markers" if labels is None else "markers+text",
        text=labels,
        textposition=sides,
        textfont={"size": 11},
        hovertext=[_hover(view, p) for p in group.points],
        hoverinfo="text",
        showlegend=bool(group.points),
        marker={
            "symbol": group.symbol,
            "size": _diameters(view, group.points),
            "line": edge,
            "opacity": 1,
            "color": RED if group.edge == RED else _colours(view, group.points),
        },
        error_x=None if estimated else _error(group, x),
        error_y=None if estimated else _error(group, y),
    )


def _baseline_label(point: Point) -> str:
    return point.name.removeprefix("teacher ")


def _is_below(point: Point) -> bool:
    """Whether a baseline's label goes below it, not above: int8 and int4 are close together."""
    return _baseline_label(point) == "int8"


def _column(group: Group, name: str) -> list[float | None]:
    return [_scaled(p, name) for p in group.points]


def _error(group: Group, name: str) -> dict[str, Any]:
    """Distances from the value to the ends of its interval."""
    found = [measurement(p, name) for p in group.points]
    unit = _unit(name)
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


def _star(chosen: Recommendation | None) -> Any:
    import plotly.graph_objects as go

    x, y = AXES[0]
    points = [] if chosen is None else [chosen.chosen]
    marker = {"symbol": "star", "size": 17, "color": GOLD, "line": {"width": 1.2, "color": "#5a4300"}}
    name = "recommended" if chosen is None else f"recommended: {html.escape(chosen.chosen.name)}"
    return go.Scatter(
        x=[_scaled(p, x) for p in points],
        y=[_scaled(p, y) for p in points],
        mode="markers",
        name=name,
        hoverinfo="skip",
        showlegend=bool(points),
        marker=marker,
    )


def _scale(view: StudyView) -> Any:
    """A trace without points that brings the colour bar."""
    import plotly.graph_objects as go

    marker = {"color": [math.log10(_bounds(view)[0])], "coloraxis": "coloraxis"}
    return go.Scatter(x=[None], y=[None], mode="markers", showlegend=False, hoverinfo="skip", marker=marker)


def _staircase(view: StudyView, x: str, y: str) -> Any:
    import plotly.graph_objects as go

    corners = staircase(view, x, y)
    return go.Scatter(
        x=[a for a, _ in corners],
        y=[b for _, b in corners],
        mode="lines",
        name=STAIRCASE,
        hoverinfo="skip",
        line={"color": ACCENT, "width": 2, "shape": "hv", "dash": "dot"},
        showlegend=len(corners) > 1,
    )


def _colour_axis(view: StudyView) -> dict[str, Any]:
    low, high = (math.log10(v) for v in _bounds(view))
    ticks = _size_ticks(view)
    bar = {
        "tickvals": [math.log10(v) for v in ticks],
        "ticktext": [f"{v:g}" for v in ticks],
        "title": {"text": "compressed size (MB)", "side": "top"},
        "orientation": "h",
        "thickness": 9,
        "len": 0.42,
        "x": 1.0,
        "xanchor": "right",
        "y": 1.03,
        "yanchor": "bottom",
        "outlinewidth": 0,
    }
    return {"colorscale": [list(stop) for stop in SIZE_SCALE], "cmin": low, "cmax": high, "colorbar": bar}


def _axis_layout(view: StudyView, x: str, y: str) -> dict[str, Any]:
    shown = window(view, y)
    return {
        "xaxis.title.text": _title(x),
        "yaxis.title.text": _title(y),
        "xaxis.autorange": True,
        "yaxis.autorange": shown is None,
        "yaxis.range": None if shown is None else list(shown),
    }


def _axis_menu(view: StudyView, drawn: Sequence[Group], chosen: Recommendation | None) -> dict[str, Any]:
    buttons = [
        {
            "label": f"{SHORT[y]} over {SHORT[x]}",
            "method": "update",
            "args": [_restyle(view, drawn, chosen, x, y), _axis_layout(view, x, y)],
        }
        for x, y in AXES
    ]
    return {
        "buttons": buttons,
        "x": 0,
        "xanchor": "left",
        "y": 1.03,
        "yanchor": "bottom",
        "pad": {"b": 6},
        "direction": "down",
        "bgcolor": "#eef1f4",
        "bordercolor": GREY,
        "font": {"color": "#1d2329", "size": 13},
        "showactive": False,
    }


def _restyle(view: StudyView, drawn: Sequence[Group], chosen: Recommendation | None, x: str, y: str) -> dict[str, Any]:
    """What every trace shows in other axes, in the order of the traces: staircase, groups, star, scale."""
    corners = staircase(view, x, y)
    stars = [] if chosen is None else [chosen.chosen]

    def columns(index: int, name: str) -> list[Any]:
        return [
            [c[index] for c in corners],
            *(_column(g, name) for g in drawn),
            [_scaled(p, name) for p in stars],
            [None],
        ]

    def errors(name: str, side: str) -> list[Any]:
        return [None, *(None if g.name == "estimated (rung 0)" else _error(g, name)[side] for g in drawn), None, None]

    return {
        "x": columns(0, x),
        "y": columns(1, y),
        "error_x.array": errors(x, "array"),
        "error_x.arrayminus": errors(x, "arrayminus"),
        "error_y.array": errors(y, "array"),
        "error_y.arrayminus": errors(y, "arrayminus"),
    }


def _draw(view: StudyView) -> bytes:
    # Figure without pyplot: pyplot keeps global state and is not safe in a thread beside the search.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(12, 8), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    _draw_staircase(axes, view)
    for layer, group in enumerate(groups(view), start=3):
        if group.points:
            _scatter(axes, view, group, layer)
    chosen = recommended(view)
    if chosen is not None:
        _draw_star(axes, chosen.chosen)
    _dress(axes, view)
    bar = figure.colorbar(_tint(view), ax=axes, pad=0.015, fraction=0.035)
    ticks = _size_ticks(view)
    bar.set_ticks(ticks, labels=[f"{v:g}" for v in ticks], minor=False)
    bar.ax.minorticks_off()
    bar.set_label("compressed size (MB)")
    bar.outline.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _tint(view: StudyView) -> Any:
    """matplotlib's map from compressed MB to colour."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    low, high = _bounds(view)
    scale = LogNorm(low, high if high > low else 2 * low)
    return ScalarMappable(scale, LinearSegmentedColormap.from_list("bytes", list(SIZE_SCALE)))


def _draw_staircase(axes: Any, view: StudyView) -> None:
    corners = staircase(view, *AXES[0])
    if len(corners) > 1:
        axes.step(
            [a for a, _ in corners],
            [b for _, b in corners],
            where="post",
            color=ACCENT,
            lw=1.8,
            ls=":",
            zorder=2,
            label=STAIRCASE,
        )


def _draw_star(axes: Any, point: Point) -> None:
    x, y = (_scaled(point, name) for name in AXES[0])
    axes.scatter(
        [x], [y], s=330, marker="*", c=GOLD, edgecolors="#5a4300", zorder=12, label=f"recommended: {point.name}"
    )


def _scatter(axes: Any, view: StudyView, group: Group, layer: int) -> None:
    """One group with its error bars; rung-0 points hollow and without."""
    xs, ys = _column(group, AXES[0][0]), _column(group, AXES[0][1])
    style: dict[str, Any] = {
        "s": [(0.9 * d) ** 2 for d in _diameters(view, group.points)],
        "alpha": group.opacity,
        "marker": group.marker,
        "zorder": layer,
        "label": f"{group.name} ({len(group.points)})",
    }
    colours = _colours(view, group.points)
    if group.name == "estimated (rung 0)":
        axes.scatter(xs, ys, facecolors="none", edgecolors=colours, lw=1.2, **style)
        return
    _error_bars(axes, group, xs, ys, layer)
    if group.edge == RED:
        axes.scatter(xs, ys, c=RED, lw=2, **style)
    else:
        axes.scatter(xs, ys, c=colours, edgecolors=group.edge, lw=2.4 if group.edge == ACCENT else 1.0, **style)
    if group.name == "teacher, unchanged":
        for point in group.points:
            _label(axes, point)


def _error_bars(axes: Any, group: Group, xs: Sequence[float | None], ys: Sequence[float | None], layer: int) -> None:
    x, y = (_error(group, name) for name in AXES[0])
    axes.errorbar(
        xs,
        ys,
        xerr=[x["arrayminus"], x["array"]],
        yerr=[y["arrayminus"], y["array"]],
        fmt="none",
        ecolor=group.edge,
        elinewidth=1,
        capsize=2.5,
        alpha=0.75,
        zorder=layer,
    )


def _label(axes: Any, point: Point) -> None:
    x, y = (_scaled(point, name) for name in AXES[0])
    if x is not None and y is not None:
        below = _is_below(point)
        axes.annotate(
            _baseline_label(point),
            (x, y),
            (7, -18) if below else (-7, 10),
            ha="left" if below else "right",
            textcoords="offset points",
            fontsize=10,
            color="#30363d",
            zorder=13,
        )


def _dress(axes: Any, view: StudyView) -> None:
    """Titles, grid, range and legend."""
    x, y = AXES[0]
    shown = window(view, y)
    if shown is not None:
        axes.set_ylim(*shown)
    axes.set_xlabel(_title(x), fontsize=12)
    axes.set_ylabel(_title(y), fontsize=12)
    axes.set_title(headline(view), loc="left", fontsize=14, pad=12)
    axes.grid(color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if view.confirmed or view.rung0:
        _legend(axes, hidden_estimates(view))
    else:
        axes.text(0.5, 0.5, "nothing scored yet", transform=axes.transAxes, ha="center", fontsize=16, color=GREY)


def _legend(axes: Any, hidden: int) -> None:
    note = f"; {hidden} estimates lie outside this view" if hidden else ""
    legend = axes.legend(
        loc="best",
        framealpha=0.92,
        edgecolor="#d5dade",
        fontsize=10,
        title=f"bars: 95 % intervals{note}",
        title_fontsize=9,
    )
    legend.set_zorder(14)
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([70])
