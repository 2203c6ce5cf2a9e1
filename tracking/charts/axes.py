"""The menu that changes the interactive front's axes, and its bar of colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paretune.search.recommend.recommend import Recommendation
from paretune.search.study.view import StudyView
from paretune.tracking.charts.points import (
    GREY,
    SIZE_SCALE,
    Group,
    bounds,
    column,
    menu_axes,
    scaled,
    size_ticks,
    staircase,
    title,
    whiskers,
    window,
)
from paretune.tracking.wording import short_of


def colour_axis(view: StudyView) -> dict[str, Any]:
    """Colour scale and bar of the compressed size."""
    low, high = (math.log10(v) for v in bounds(view))
    ticks = size_ticks(view)
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


def axis_layout(view: StudyView, x: str, y: str) -> dict[str, Any]:
    """Titles and range of a pair of axes."""
    shown = window(view, y)
    return {
        "xaxis.title.text": title(x, view.figures),
        "yaxis.title.text": title(y, view.figures),
        "xaxis.autorange": True,
        "yaxis.autorange": shown is None,
        "yaxis.range": None if shown is None else list(shown),
    }


def axis_menu(view: StudyView, drawn: Sequence[Group], chosen: Recommendation | None) -> dict[str, Any]:
    """The menu with a button per pair of axes."""
    buttons = [
        {
            "label": f"{short_of(y)} over {short_of(x)}",
            "method": "update",
            "args": [_restyle(view, drawn, chosen, x, y), axis_layout(view, x, y)],
        }
        for x, y in menu_axes(view)
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
            *(column(g, name) for g in drawn),
            [scaled(p, name) for p in stars],
            [None],
        ]

    def errors(name: str, side: str) -> list[Any]:
        return [None, *(None if g.name == "estimated (rung 0)" else whiskers(g, name)[side] for g in drawn), None, None]

    return {
        "x": columns(0, x),
        "y": columns(1, y),
        "error_x.array": errors(x, "array"),
        "error_x.arrayminus": errors(x, "arrayminus"),
        "error_y.array": errors(y, "array"),
        "error_y.arrayminus": errors(y, "arrayminus"),
    }
