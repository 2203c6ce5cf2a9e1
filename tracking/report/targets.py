"""The report's section of further targets: what each costs, the picture, the regret matrices, who cannot run where."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from paretune.search.recommend.compare import Comparison, Side, compare
from paretune.search.recommend.regret import Regret
from paretune.search.study.view import StudyView
from paretune.tracking.charts.front import PLOTLY_CONFIG
from paretune.tracking.charts.targets_picture import cell_text, targets_figure
from paretune.tracking.report.page import section, table
from paretune.tracking.wording import short_of, with_interval

MOST_REASONS = 12


def targets_section(view: StudyView) -> str:
    """Nothing for a study without further targets. The page must hold plotly.js."""
    found = compare(view)
    if found is None:
        return ""
    figure = targets_figure(found).to_html(
        full_html=False, include_plotlyjs=False, div_id="targets", config=PLOTLY_CONFIG
    )
    note = (
        '<p class="quiet">Quality is the same everywhere and was taken once. Solid: measured here. Hatched, hollow and '
        "dotted: predicted from the hardware profile, with the interval of its priors. A cell says how much longer the fastest "
        "candidate of its row (within the loss limit) takes on the target of its column than the column's own fastest.</p>"
    )
    matrices = "".join(_matrix(found, regret) for regret in found.regrets)
    body = f'<div class="chart">{figure}</div>{note}{_targets(found)}{matrices}{_reasons(found)}'
    return section("Targets", body)


def _targets(found: Comparison) -> str:
    rows = [_row(found, side) for side in found.sides]
    header = ["target", "costs", "cannot run", "front", "recommended", f"its {short_of(found.view.figures.latency)}"]
    return table(header, rows)


def _row(found: Comparison, side: Side) -> list[str]:
    kinds = Counter(side.provenance(p.key) for p in side.view.confirmed)
    counts = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()) or "none"
    notes = "".join(f'<br><span class="quiet">{escape(note)}</span>' for note in side.notes)
    chosen = side.recommended()
    name, cost = "none", "–"
    if chosen is not None:
        m = chosen.chosen.measurements[found.view.figures.latency]
        name = f"{escape(chosen.chosen.name)}<br><code>{chosen.chosen.key[:8]}</code>"
        text = escape(with_interval(found.view.figures.latency, m))
        cost = f'<span class="{m.provenance}" title="{escape(m.note)}">{text}</span> {m.provenance}'
    front = len(side.view.front) - len(side.view.ties)
    searched = ' <span class="quiet">searched</span>' if side.target is None else ""
    return [f"<b>{escape(side.name)}</b>{searched}{notes}", counts, str(len(side.infeasible)), str(front), name, cost]


def _matrix(found: Comparison, regret: Regret) -> str:
    rows = [
        [f"<b>{escape(a)}</b><br>{_choice(found, regret, a)}", *(_cell(found, regret, a, b) for b in regret.targets)]
        for a in regret.targets
    ]
    best = regret.robust
    told = "No candidate has a known cost on every target."
    if best is not None:
        name = found.point(best.key).name
        told = (
            f"Smallest worst regret: <b>{escape(name)}</b> <code>{best.key[:8]}</code>, at most {best.worst:+.1%} "
            f"({escape(best.where)})."
        )
    title = f"<h3>Regret within {regret.limit:.0%} loss</h3>"
    header = ["choice of \\ runs on", *regret.targets]
    return f"{title}{table(header, rows)}<p>{told}</p>"


def _choice(found: Comparison, regret: Regret, target: str) -> str:
    key = regret.choices[target]
    if key is None:
        return '<span class="quiet">nothing runs within the limit</span>'
    return f'<span class="quiet">{escape(found.point(key).name)} <code>{key[:8]}</code></span>'


def _cell(found: Comparison, regret: Regret, a: str, b: str) -> str:
    origin = found.origin(regret, a, b)
    return f'<span class="{origin}" title="{origin}">{cell_text(regret.matrix[a][b])}</span>'


def _reasons(found: Comparison) -> str:
    """Why candidates cannot run on a target, each reason once with how many it keeps out."""
    counts = Counter((side.name, reason) for side in found.sides for reason in side.infeasible.values())
    if not counts:
        return ""
    rows = [[escape(name), str(n), escape(reason)] for (name, reason), n in counts.most_common(MOST_REASONS)]
    return "<h3>What cannot run where</h3>" + table(["target", "candidates", "why"], rows)


def targets_table(view: StudyView) -> dict[str, Any] | None:
    """Every candidate's costs on every target as MLflow's table format; None for a study without further targets."""
    found = compare(view)
    if found is None:
        return None
    latency = view.figures.latency
    rows = []
    for side in found.sides:
        front = {p.key for p in side.view.front}
        for p in view.confirmed:
            there, why = side.view.point(p.key), side.infeasible.get(p.key, "")
            m = None if there is None else there.measurements[latency]
            memory = None if there is None else there.measurements["peak_memory_bytes"].value
            values = (None, None, None) if m is None else (m.value, m.low, m.high)
            rows.append([side.name, p.key, p.name, *values, side.provenance(p.key), memory, p.key in front, why])
    columns = [
        "target",
        "key",
        "name",
        latency,
        "low",
        "high",
        "provenance",
        "peak_memory_bytes",
        "front",
        "infeasible",
    ]
    return {"columns": columns, "data": rows}
