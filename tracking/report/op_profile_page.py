"""A profile as a page of its own: the pictures as interactive charts (plotly), tables of ops, layers and places."""

from __future__ import annotations

import html
from typing import Any

from paretune.objectives.profiler.op_costs import PHASES, Total
from paretune.objectives.profiler.op_profile import OpProfile
from paretune.tracking.charts.front import PLOTLY_CONFIG
from paretune.tracking.charts.op_profile_points import (
    COLOURS,
    PHASE_COLOURS,
    layer_bars,
    roof_lines,
    roof_points,
    title,
)
from paretune.tracking.charts.points import ACCENT, GREY
from paretune.tracking.report.page import PAGE, POLICY, STYLE, facts, section, table

MOST_ROWS = 40
OP_COLUMNS = ("", "ops", "ms", "share", "GFLOP", "MB", "ops/byte", "GFLOP/s", "GB/s", "of the roof", "bound by")


def profile_html(found: OpProfile) -> str:
    """The page, about 5 MB because plotly.js is in it."""
    from plotly.offline import get_plotlyjs

    chart = figure(found).to_html(full_html=False, include_plotlyjs=False, div_id="profile", config=PLOTLY_CONFIG)
    head = f"<header><h1>{html.escape(found.subject.name)}</h1><p>{html.escape(title(found))}</p></header>"
    body = [head, f'<div class="chart">{chart}</div>', section("Where compression would pay", _places(found))]
    for phase in PHASES:
        for view, name in (("ops", "op"), ("groups", "matrix group"), ("layers", "layer")):
            rows = [total_row(t) for t in found.totals(phase, view)[:MOST_ROWS]]
            body.append(section(f"{phase.capitalize()} by {name}", table(OP_COLUMNS, rows)))
    body.append(section("Measured with", facts(found.settings | {"roof": found.roof.__dict__}, "")))
    body.append("".join(f'<p class="quiet">{html.escape(note)}</p>' for note in found.notes))
    shown = html.escape(found.subject.name)
    return PAGE.format(title=shown, body="\n".join(body), style=STYLE, plotly=get_plotlyjs(), theme="", policy=POLICY)


def total_row(t: Total) -> list[str]:
    """The cells of OP_COLUMNS, escaped."""
    return [
        f"<code>{html.escape(t.label)}</code>",
        str(t.count),
        f"{t.ms:.4f}",
        f"{t.share:.1%}",
        f"{t.flops / 1e9:.4f}",
        f"{t.bytes / 1e6:.3f}",
        f"{t.intensity:.2f}",
        f"{t.gflop_per_s:.1f}",
        f"{t.gb_per_s:.1f}",
        f"{t.efficiency:.0%}",
        t.bound,
    ]


def _places(found: OpProfile) -> str:
    rows = [
        [
            html.escape(place.text),
            f"{place.decode_ms.value:.4f} [{place.decode_ms.low:.4f} … {place.decode_ms.high:.4f}]",
            f"{place.ttft_ms.value:.3f} [{place.ttft_ms.low:.3f} … {place.ttft_ms.high:.3f}]",
            f"{place.read_bytes / 1e6:.3f}",
        ]
        for place in found.best
    ]
    header = (
        "change",
        "ms per decode step saved (predicted)",
        "ms of TTFT saved (predicted)",
        "MB less read per token",
    )
    return table(header, rows) if rows else '<p class="quiet">No change would save anything.</p>'


def figure(found: OpProfile) -> Any:
    """Roofline, milliseconds per layer, and what the places save."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    specs: list[list[Any]] = [[{"rowspan": 2}, {}], [None, {}]]
    titles = [
        "ops under the roofline",
        "where a decode step goes (ms)",
        "what a decode step would save (ms, predicted)",
    ]
    drawn = make_subplots(2, 2, specs=specs, subplot_titles=titles, column_widths=[0.55, 0.45])
    for name, (xs, ys) in roof_lines(found).items():
        dash = "solid" if name.startswith("fp32") else "dash"
        drawn.add_trace(go.Scatter(x=xs, y=ys, name=name, mode="lines", line={"color": GREY, "dash": dash}), 1, 1)
    for phase, colour in PHASE_COLOURS.items():
        drawn.add_trace(_points(found, phase, colour), 1, 1)
    names, bars = layer_bars(found)
    for group, values in bars.items():
        if any(values):
            bar = go.Bar(x=values, y=names, orientation="h", name=group, marker_color=COLOURS[group])
            drawn.add_trace(bar, 1, 2)
    drawn.add_trace(_saved(found), 2, 2)
    drawn.update_layout(
        barmode="stack",
        height=720,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": GREY},
        margin={"l": 70, "r": 16, "t": 40, "b": 56},
        legend={"orientation": "h", "y": -0.1, "traceorder": "normal"},
    )
    drawn.update_xaxes(type="log", title="operations per byte", row=1, col=1)
    drawn.update_yaxes(type="log", title="10⁹ operations per second", row=1, col=1)
    drawn.update_yaxes(autorange="reversed", col=2)
    return drawn


def _points(found: OpProfile, phase: str, colour: str) -> Any:
    import plotly.graph_objects as go

    points = [p for p in roof_points(found) if p.phase == phase]
    return go.Scatter(
        x=[p.intensity for p in points],
        y=[p.gflop_per_s for p in points],
        text=[p.label for p in points],
        hovertext=[f"{p.label}: {p.share:.1%} of {phase}" for p in points],
        hoverinfo="text",
        mode="markers+text",
        textposition="middle right",
        name=phase,
        marker={"color": colour, "size": [8 + 40 * p.share**0.5 for p in points], "opacity": 0.7},
    )


def _saved(found: OpProfile) -> Any:
    import plotly.graph_objects as go

    best = found.best
    return go.Bar(
        x=[p.decode_ms.value for p in best],
        y=[p.text for p in best],
        orientation="h",
        name="saved",
        marker_color=ACCENT,
        showlegend=False,
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [p.decode_ms.high - p.decode_ms.value for p in best],
            "arrayminus": [p.decode_ms.value - p.decode_ms.low for p in best],
        },
    )
