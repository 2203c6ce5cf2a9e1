"""A profile as a still picture (matplotlib): roofline, milliseconds per layer, the places where compression would pay."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from paretune.common.files import write_atomically
from paretune.objectives.profiler.op_profile import OpProfile
from paretune.tracking.charts.op_profile_points import (
    COLOURS,
    PHASE_COLOURS,
    layer_bars,
    roof_lines,
    roof_points,
    title,
)
from paretune.tracking.charts.points import ACCENT, GREY


def profile_picture(found: OpProfile, path: Path) -> None:
    """SVG or PNG (1400 x 800 pixels), by the suffix of `path`, written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(14, 8), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplot_mosaic([["roof", "layers"], ["roof", "places"]], width_ratios=[1.15, 1])
    figure.suptitle(title(found), x=0.01, ha="left", fontsize=13)
    _roof(panels["roof"], found)
    _layers(panels["layers"], found)
    _places(panels["places"], found)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."))
    write_atomically(path, buffer.getvalue())


def _roof(axes: Any, found: OpProfile) -> None:
    for name, (xs, ys) in roof_lines(found).items():
        axes.plot(xs, ys, color=GREY, lw=1.6, ls="-" if name.startswith("fp32") else "--", label=name)
    for phase, colour in PHASE_COLOURS.items():
        points = [p for p in roof_points(found) if p.phase == phase]
        sizes = [40 + 900 * p.share for p in points]
        xs, ys = [p.intensity for p in points], [p.gflop_per_s for p in points]
        axes.scatter(
            xs, ys, s=sizes, color=colour, alpha=0.7, edgecolors="white", label=f"{phase} (area: time)", zorder=3
        )
        for p in points:
            axes.annotate(p.label, (p.intensity, p.gflop_per_s), (7, 5), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="10⁹ operations per second")
    axes.set_title(f"ops under the roofline ({found.roof.bandwidth_gb_per_s:.0f} GB/s)", loc="left", fontsize=11)
    axes.grid(color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)
    legend = axes.legend(loc="lower right", fontsize=9)
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([60])


def _layers(axes: Any, found: OpProfile) -> None:
    names, bars = layer_bars(found)
    left = [0.0] * len(names)
    for group, values in bars.items():
        if any(values):
            axes.barh(names, values, left=left, color=COLOURS[group], label=group)
            left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per decode step")
    axes.set_title("where a decode step goes", loc="left", fontsize=11)
    axes.tick_params(axis="y", labelsize=8 if len(names) <= 20 else 5)
    narrow = {"handlelength": 0.8, "handletextpad": 0.4, "columnspacing": 0.8}
    axes.legend(
        fontsize=8,
        loc="lower right",
        bbox_to_anchor=(1.02, 0.99),
        ncols=len(bars),
        frameon=False,
        borderpad=0.2,
        **narrow,
    )


def _places(axes: Any, found: OpProfile) -> None:
    axes.set_title("where compression would pay (predicted)", loc="left", fontsize=11)
    axes.set_xlabel("ms that a decode step would save")
    best = [(place.text, place.decode_ms) for place in found.best]
    if not best:
        axes.text(0.5, 0.5, "nothing found", transform=axes.transAxes, ha="center", color=GREY)
        return
    values = [m.value for _, m in best]
    errors = [[m.value - m.low for _, m in best], [m.high - m.value for _, m in best]]
    axes.barh([text for text, _ in best], values, xerr=errors, color=ACCENT, ecolor=GREY, capsize=3)
    axes.invert_yaxis()
