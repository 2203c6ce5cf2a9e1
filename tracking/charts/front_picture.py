"""The front as a file (matplotlib): NLL over decode, the same groups of points as the interactive one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paretune.common.files import write_atomically
from paretune.search.study.view import Point, StudyView
from paretune.tracking.charts.points import (
    ACCENT,
    GOLD,
    GREY,
    RED,
    SIZE_SCALE,
    STAIRCASE,
    Group,
    baseline_label,
    bounds,
    colours_of,
    column,
    diameters,
    first_axes,
    groups,
    hidden_estimates,
    is_below,
    scaled,
    size_ticks,
    staircase,
    title,
    whiskers,
    window,
)
from paretune.tracking.wording import headline, recommended


def front_png(view: StudyView, path: Path) -> None:
    """NLL over decode as a PNG of 1200 x 800 pixels, written atomically."""
    write_atomically(path, _draw(view))


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
    ticks = size_ticks(view)
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

    low, high = bounds(view)
    scale = LogNorm(low, high if high > low else 2 * low)
    return ScalarMappable(scale, LinearSegmentedColormap.from_list("bytes", list(SIZE_SCALE)))


def _draw_staircase(axes: Any, view: StudyView) -> None:
    corners = staircase(view, *first_axes(view))
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
    x, y = (scaled(point, name) for name in first_axes(point))
    axes.scatter(
        [x], [y], s=330, marker="*", c=GOLD, edgecolors="#5a4300", zorder=12, label=f"recommended: {point.name}"
    )


def _scatter(axes: Any, view: StudyView, group: Group, layer: int) -> None:
    """One group with its error bars; rung-0 points hollow and without."""
    xs, ys = (column(group, name) for name in first_axes(view))
    style: dict[str, Any] = {
        "s": [(0.9 * d) ** 2 for d in diameters(view, group.points)],
        "alpha": group.opacity,
        "marker": group.marker,
        "zorder": layer,
        "label": f"{group.name} ({len(group.points)})",
    }
    colours = colours_of(view, group.points)
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
    x, y = (whiskers(group, name) for name in first_axes(group))
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
    x, y = (scaled(point, name) for name in first_axes(point))
    if x is not None and y is not None:
        below = is_below(point)
        axes.annotate(
            baseline_label(point),
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
    x, y = first_axes(view)
    shown = window(view, y)
    if shown is not None:
        axes.set_ylim(*shown)
    axes.set_xlabel(title(x, view.figures), fontsize=12)
    axes.set_ylabel(title(y, view.figures), fontsize=12)
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
