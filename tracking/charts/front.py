"""The front as an interactive picture (plotly): NLL over decode at first, a menu changes the axes."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from paretune.search.recommend.recommend import Recommendation
from paretune.search.study.view import Point, StudyView
from paretune.tracking.charts.axes import axis_layout, axis_menu, colour_axis
from paretune.tracking.charts.points import (
    ACCENT,
    GOLD,
    GREY,
    RED,
    STAIRCASE,
    Group,
    baseline_label,
    bounds,
    colours_of,
    column,
    diameters,
    first_axes,
    groups,
    is_below,
    scaled,
    staircase,
    whiskers,
)
from paretune.tracking.wording import is_disturbed, measurement, recommended, short_of, told, with_interval

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def front_figure(view: StudyView) -> Figure:
    """The interactive front: NLL over decode at first, a menu changes the axes. Legible on light and dark pages."""
    import plotly.graph_objects as go

    drawn, chosen = groups(view), recommended(view)
    traces = [
        _staircase(view, *first_axes(view)),
        *(_trace(view, group) for group in drawn),
        _star(chosen),
        _scale(view),
    ]
    figure = go.Figure(traces)
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY, "size": 13},
        height=680,
        margin={"l": 70, "r": 16, "t": 92, "b": 56},
        hovermode="closest",
        coloraxis=colour_axis(view),
        legend={"orientation": "h", "x": 0, "y": -0.12, "yanchor": "top"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": ACCENT},
        updatemenus=[axis_menu(view, drawn, chosen)],
        **axis_layout(view, *first_axes(view)),
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


def _hover(view: StudyView, point: Point) -> str:
    state = "estimated" if point.kind == "rung0" else _standing(view, point)
    lines = [f"<b>{html.escape(point.name)}</b> {point.key[:8]} · {state}", html.escape(point.description)]
    for name in told(view.figures):
        m = measurement(point, name)
        if m is not None:
            lines.append(f"{short_of(name)}: {with_interval(name, m)} ({m.provenance})")
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
    x, y = first_axes(view)
    labels = [baseline_label(p) for p in group.points] if group.name == "teacher, unchanged" else None
    sides = ["bottom right" if is_below(p) else "top left" for p in group.points]
    edge = {"width": 2.5 if group.edge != GREY else 1.2, "color": group.edge}
    return go.Scatter(
        x=column(group, x),
        y=column(group, y),
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
            "size": diameters(view, group.points),
            "line": edge,
            "opacity": 1,
            "color": RED if group.edge == RED else colours_of(view, group.points),
        },
        error_x=None if estimated else whiskers(group, x),
        error_y=None if estimated else whiskers(group, y),
    )


def _star(chosen: Recommendation | None) -> Any:
    import plotly.graph_objects as go

    x, y = first_axes(chosen)
    points = [] if chosen is None else [chosen.chosen]
    marker = {"symbol": "star", "size": 17, "color": GOLD, "line": {"width": 1.2, "color": "#5a4300"}}
    name = "recommended" if chosen is None else f"recommended: {html.escape(chosen.chosen.name)}"
    return go.Scatter(
        x=[scaled(p, x) for p in points],
        y=[scaled(p, y) for p in points],
        mode="markers",
        name=name,
        hoverinfo="skip",
        showlegend=bool(points),
        marker=marker,
    )


def _scale(view: StudyView) -> Any:
    """A trace without points that brings the colour bar."""
    import plotly.graph_objects as go

    marker = {"color": [math.log10(bounds(view)[0])], "coloraxis": "coloraxis"}
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
