"""All targets of a study in one picture (plotly): a front for each, and below them the regret matrix.

Measured is solid, predicted hatched: filled markers on a solid line against hollow ones with the interval of their priors
on a dotted line, plain cells against hatched ones. A front is drawn in latency (logarithmic: targets lie decades apart)
and loss, where a member that leads in bytes only is off the staircase.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from paretune.search.front import non_dominated
from paretune.search.recommend.compare import Comparison, Side, compare
from paretune.search.recommend.regret import INFEASIBLE, Regret
from paretune.search.study.view import Point, StudyView, label_of
from paretune.tracking.charts.front import PLOTLY_CONFIG
from paretune.tracking.charts.points import ACCENT, GREY, RED

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Twelve hues of middle lightness, apart in lightness where they are neighbours in hue; symbols change with every round.
COLOURS = (
    *("#2f7fe0", "#ee7b1c", "#12a37a", "#d9453d", "#8c62d6", "#a8742f"),
    *("#d85fa8", "#6f7a86", "#9aa51f", "#17a5bf", "#5c6bc0", "#c0572b"),
)
SYMBOLS = ("circle", "diamond", "square", "triangle-up")
FRONTS_PX, MARGINS_PX, ROW_PX = 430, 230, 34
# Names of so many targets fit beside each other.
STRAIGHT = 4
# Regret that has the darkest cell, and the colours from none to that.
MOST_SHOWN = 0.5
CELL_SCALE = ((0.0, "#d9efe7"), (0.25, "#f2e2a0"), (1.0, "#e0713f"))


def targets_figure(found: Comparison) -> Figure:
    """Fronts above, the matrix of `found.shown` below. Legible on light and dark pages."""
    from plotly.subplots import make_subplots

    regret, rows = found.shown, len(found.sides)
    height = FRONTS_PX + MARGINS_PX + ROW_PX * rows
    shares = [FRONTS_PX, ROW_PX * rows]
    figure = make_subplots(2, 1, row_heights=shares, vertical_spacing=110 / height)
    for number, side in enumerate(found.sides):
        for trace in _front(side, number):
            figure.add_trace(trace, 1, 1)
    for trace in _cells(found, regret):
        figure.add_trace(trace, 2, 1)
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 13},
        height=height,
        margin={"l": 150, "r": 16, "t": 30, "b": 70 if rows <= STRAIGHT else 110},
        barmode="overlay",
        bargap=0,
        hovermode="closest",
        legend={"orientation": "v", "x": 1.01, "y": 1, "yanchor": "top"},
    )
    _dress_fronts(figure, found)
    _dress_matrix(figure, regret)
    return figure


def targets_html(view: StudyView) -> str | None:
    """The picture as a page of its own, plotly.js inlined; None for a study without further targets."""
    found = compare(view)
    if found is None:
        return None
    return str(targets_figure(found).to_html(include_plotlyjs=True, config=PLOTLY_CONFIG))


def _front(side: Side, number: int) -> list[Any]:
    """The staircase of a front in latency and loss, and its members."""
    import plotly.graph_objects as go

    colour = COLOURS[number % len(COLOURS)]
    symbol = SYMBOLS[number // len(COLOURS) % len(SYMBOLS)]
    members = side.view.front
    places = [(_latency(p), _loss(p)) for p in members]
    corners = sorted({places[i] for i in non_dominated(places)})
    solid = bool(members) and all(side.provenance(p.key) == "measured" for p in members)
    name = html.escape(side.name)
    line = go.Scatter(
        x=[x for x, _ in corners],
        y=[y for _, y in corners],
        mode="lines",
        line={"color": colour, "width": 2, "shape": "hv", "dash": "solid" if solid else "dot"},
        hoverinfo="skip",
        legendgroup=name,
        showlegend=False,
    )
    is_measured = [side.provenance(p.key) == "measured" for p in members]
    kept = [p.measurements[side.view.figures.latency] for p in members]
    points = go.Scatter(
        x=[x for x, _ in places],
        y=[y for _, y in places],
        mode="markers",
        name=f"{name}{'' if solid else ' (predicted)' if not any(is_measured) else ' (in part predicted)'}",
        legendgroup=name,
        marker={
            "symbol": [symbol if yes else f"{symbol}-open" for yes in is_measured],
            "size": 9,
            "color": colour,
            "line": {"width": 1.6, "color": colour},
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [m.high - m.value for m in kept],
            "arrayminus": [m.value - m.low for m in kept],
            "thickness": 0.8,
            "width": 2,
            "color": _faint(colour),
        },
        hovertext=[_hover(side, p) for p in members],
        hoverinfo="text",
    )
    return [line, points]


def _faint(colour: str) -> str:
    """A colour for intervals, which overlap where there are many targets."""
    red, green, blue = bytes.fromhex(colour[1:])
    return f"rgba({red},{green},{blue},0.35)"


def _latency(point: Point) -> float:
    return point.measurements[point.figures.latency].value


def _loss(point: Point) -> float:
    """In per cent of the fp32 teacher's quality."""
    return 100 * point.measurements["relative_loss"].value


def _hover(side: Side, point: Point) -> str:
    m = point.measurements[side.view.figures.latency]
    lines = [
        f"<b>{html.escape(point.name)}</b> {point.key[:8]} on {html.escape(side.name)}",
        f"{m.value:.4g} {html.escape(m.unit)} [{m.low:.4g}, {m.high:.4g}] ({m.provenance})",
        f"loss {_loss(point):+.1f} %",
    ]
    return "<br>".join(lines)


def cell_text(value: float | None) -> str:
    """A regret as people read it."""
    if value is None:
        return "?"
    if value == INFEASIBLE:
        return "cannot run"
    return f"{value:+.1%}" if value < 1 else f"×{1 + value:.1f}"


def _cells(found: Comparison, regret: Regret) -> list[Any]:
    """One trace for measured cells and one, hatched, for predicted ones. A cell is a bar that does not start at zero."""
    import plotly.graph_objects as go

    traces, count = [], len(regret.targets)
    for origin, shape in (("measured", ""), ("predicted", "/")):
        cells = [
            (row, column, regret.matrix[a][b])
            for row, a in enumerate(regret.targets)
            for column, b in enumerate(regret.targets)
            if found.origin(regret, a, b) == origin
        ]
        traces.append(
            go.Bar(
                x=[column for _, column, _ in cells],
                y=[1] * len(cells),
                base=[count - 1 - row for row, _, _ in cells],
                width=1,
                marker={
                    "color": [_colour(value) for _, _, value in cells],
                    "line": {"color": "#ffffff", "width": 2},
                    "pattern": {
                        "shape": shape,
                        "fillmode": "overlay",
                        "fgcolor": "rgba(60,69,77,0.6)",
                        "size": 7,
                        "solidity": 0.2,
                    },
                },
                text=[f"<b>{cell_text(value)}</b>" for _, _, value in cells],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                textfont={"color": "#1d2329", "size": 12},
                name=f"regret, {origin}",
                hovertext=[_told(found, regret, row, column) for row, column, _ in cells],
                hoverinfo="text",
                showlegend=bool(cells),
            )
        )
    return traces


def _told(found: Comparison, regret: Regret, row: int, column: int) -> str:
    a, b = regret.targets[row], regret.targets[column]
    key = regret.choices[a]
    name = "no candidate" if key is None else found.point(key).name
    return (
        f"{html.escape(name)}, the choice of {html.escape(a)},<br>on {html.escape(b)}: {cell_text(regret.matrix[a][b])}"
    )


def _colour(value: float | None) -> str:
    if value is None:
        return "#c9ced3"
    if value == INFEASIBLE:
        return RED
    share = min(1.0, value / MOST_SHOWN)
    upper = next(i for i, (stop, _) in enumerate(CELL_SCALE) if share <= stop)
    (start, first), (end, second) = CELL_SCALE[max(0, upper - 1)], CELL_SCALE[upper]
    weight = 0.0 if end == start else (share - start) / (end - start)
    pairs = zip(bytes.fromhex(first[1:]), bytes.fromhex(second[1:]), strict=True)
    return "#" + "".join(f"{round(a + weight * (b - a)):02x}" for a, b in pairs)


def _dress_fronts(figure: Figure, found: Comparison) -> None:
    line = {"gridcolor": "rgba(128,136,144,0.22)", "zeroline": False, "linecolor": GREY, "showline": True}
    latencies = [_latency(p) for side in found.sides for p in side.view.front]
    label = label_of(found.view.figures.latency, found.view.figures)
    ticks = _ticks(latencies)
    figure.update_xaxes(
        row=1,
        col=1,
        type="log",
        title_text=f"{label}, logarithmic",
        tickvals=ticks,
        ticktext=[f"{v:g}" for v in ticks],
        ticks="outside",
        **line,
    )
    figure.update_yaxes(row=1, col=1, title_text="loss against the fp32 teacher (%)", ticks="outside", **line)


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 of every decade that a logarithmic axis can show."""
    low, high = (math.log10(f(values, default=1.0)) for f in (min, max))
    return [digit * 10.0**e for e in range(math.floor(low) - 1, math.ceil(high) + 1) for digit in (1, 2, 5)]


def _dress_matrix(figure: Figure, regret: Regret) -> None:
    count = len(regret.targets)
    best = regret.robust
    told = "" if best is None else f"; smallest worst regret: {best.key[:8]}, {best.worst:+.1%}"
    figure.update_xaxes(
        row=2,
        col=1,
        tickvals=list(range(count)),
        ticktext=[html.escape(t) for t in regret.targets],
        range=[-0.5, count - 0.5],
        showgrid=False,
        zeroline=False,
        tickangle=0 if count <= STRAIGHT else -25,
        title_text=f"runs on (regret within {regret.limit:.0%} loss{told})",
        title_font={"color": ACCENT},
    )
    figure.update_yaxes(
        row=2,
        col=1,
        tickvals=[count - 0.5 - i for i in range(count)],
        ticktext=[html.escape(t) for t in regret.targets],
        range=[0, count],
        showgrid=False,
        zeroline=False,
        title_text="choice of",
        automargin=True,
    )
