"""The report: one self-contained page of a study, for a browser without a network, on a screen or a phone.

Everything is read from the view. All text is escaped; a content security policy forbids the page to load anything.
"""

from __future__ import annotations

import shlex
from html import escape
from typing import Any

from paretune.common.command_line import pasted
from paretune.common.files import write_atomically
from paretune.search.recommend.recommend import Recommendation
from paretune.search.study.view import StudyView, failure_counts
from paretune.tracking.charts.front import PLOTLY_CONFIG, front_figure
from paretune.tracking.charts.front_picture import front_png
from paretune.tracking.charts.points import hidden_estimates
from paretune.tracking.report.page import PAGE, POLICY, STYLE, THEME_SCRIPT, duration, facts, minute, section, table
from paretune.tracking.report.tables import baseline_table, disturbed_table, front_table
from paretune.tracking.report.targets import targets_section
from paretune.tracking.wording import named, recommended

STATES = {
    "complete": "complete",
    "interrupted": "interrupted, can be resumed",
    "paused": "paused, can be resumed",
    "cancelled": "cancelled",
    "running": "running",
    "failed": "failed",
}
LAST_EVENTS = 25


def write_report(view: StudyView) -> None:
    """Write report.html and front.png into the study's folder, each atomically."""
    front_png(view, view.folder / "front.png")
    write_atomically(view.folder / "report.html", report_html(view).encode())


def report_html(view: StudyView) -> str:
    """The page, about 5 MB because plotly.js is in it. A study without any confirmed or scored candidate is fine."""
    from plotly.offline import get_plotlyjs

    chosen = recommended(view)
    parts = [_head(view), _headline(view, chosen), _chart(view), front_table(view, chosen), baseline_table(view)]
    parts += [
        targets_section(view),
        disturbed_table(view),
        _effort(view),
        _failures(view),
        _trust(view),
        _events(view),
        _origin(view),
    ]
    body, title = "\n".join(parts), escape(view.study)
    return PAGE.format(title=title, body=body, style=STYLE, plotly=get_plotlyjs(), theme=THEME_SCRIPT, policy=POLICY)


def _head(view: StudyView) -> str:
    meta = view.meta
    state = str(meta.get("state") or "running")
    label = STATES.get(state, state) + (f": {meta['stage']}" if state == "running" and meta.get("stage") else "")
    machine = f"{named(meta.get('teacher'))} for {named(meta.get('profile'))}"
    facts = f"{machine}{_text_of(meta.get('corpus'))}, started {minute(meta.get('created'))}"
    badge = f'<span class="state {escape(state)}">{escape(label)}</span>'
    return f'<header><h1>{escape(view.study)}</h1> {badge}<p class="quiet">{escape(facts)}</p></header>'


def _text_of(corpus: Any) -> str:
    """The text by source and fingerprint: an NLL compares with another only on the same text."""
    if not isinstance(corpus, dict) or not corpus.get("fingerprint"):
        return ""
    return f" on {corpus.get('source') or 'text'} (fingerprint {corpus['fingerprint']})"


def _headline(view: StudyView, chosen: Recommendation | None) -> str:
    if chosen is None:
        return (
            '<section class="answer"><h2>No recommendation yet</h2><p>No candidate is confirmed: nothing was exported, '
            "scored and measured so far. Estimates below are predictions.</p></section>"
        )
    point = chosen.chosen
    reasons = "".join(f"<li>{escape(text)}</li>" for text in chosen.why)
    price = f"<li>runner-up: {escape(chosen.price)}</li>" if chosen.price else ""
    title = f"<h2>★ Recommended: {escape(point.name)} <code>{point.key[:8]}</code></h2>"
    note = (
        '<p class="quiet">Measured unless a number says otherwise. Chosen without limits of yours: give '
        f"<code>{escape(pasted('recommend', view.study, home=view.folder.parent.parent, stored=True))}</code> "
        "a limit to get the best within it.</p>"
    )
    body = f"<p>{escape(point.description)}</p><ul>{reasons}{price}</ul>{note}"
    return f'<section class="answer">{title}{body}</section>'


def _chart(view: StudyView) -> str:
    if not view.rung0 and not view.confirmed:
        return section("Front", '<p class="quiet">Nothing is scored yet.</p>')
    figure = front_figure(view).to_html(full_html=False, include_plotlyjs=False, div_id="front", config=PLOTLY_CONFIG)
    hidden = hidden_estimates(view)
    more = f" {hidden} estimates lie outside the first view; double-click shows everything." if hidden else ""
    note = (
        '<p class="quiet">Solid: confirmed, measured, with 95 % intervals (of the quality: paired with the teacher). '
        "Hollow: predicted at rung 0, before "
        f"recovery. The menu changes the axes.{more}</p>"
    )
    without = "<noscript><p>The chart needs JavaScript; front.png beside this page shows the same.</p></noscript>"
    return section("Front", f'<div class="chart">{figure}</div>{without}{note}')


def _effort(view: StudyView) -> str:
    meta, spent = view.meta, view.meta.get("spent_s")
    budget = f" of {duration(meta['budget_s'])}" if meta.get("budget_s") else ""
    space = f" of {float(meta['space_size']):.3g} possible" if meta.get("space_size") else ""
    tiles = [
        (str(len(view.rung0)), f"scored at rung 0 (estimates){space}"),
        (str(len(view.confirmed)), "confirmed (measured)"),
        (str(len(view.front)), f"on the front, {len(view.ties)} of them statistical ties"),
        (str(len(view.failures)), "failed, infeasible or lost"),
    ]
    if spent:
        tiles.append((duration(spent), f"spent{budget} (wall clock)"))
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles)
    return section("Effort", f'<div class="tiles">{boxes}</div>{_stages(view)}')


def _stages(view: StudyView) -> str:
    total = sum(view.seconds_by_stage.values())
    if total <= 0:
        return ""
    rows = [
        f'<div class="stage"><span>{escape(name)}</span><i style="width:{seconds / total:.1%}"></i>'
        f"<span>{duration(seconds)}, {seconds / total:.0%}</span></div>"
        for name, seconds in view.seconds_by_stage.items()
    ]
    return '<h3>Time per stage (measured)</h3><div class="stages">' + "".join(f"{row}" for row in rows) + "</div>"


def _failures(view: StudyView) -> str:
    if not view.failures:
        return section("Failures", '<p class="quiet">None.</p>')
    rows = [[str(count), escape(reason)] for reason, count in failure_counts(view).most_common()]
    return section("Failures", table(["times", "what failed and why"], rows))


def _trust(view: StudyView) -> str:
    """How far the predictions can be trusted."""
    fit, calibration = view.meta.get("fit_error"), view.meta.get("calibration")
    parts = [
        '<h3>Latency fit</h3><p class="quiet">Held-out error of predicted latencies against measured ones; '
        "errors are fractions.</p>",
        facts(fit, "no fit yet"),
        '<h3>Calibration of rung 0</h3><p class="quiet">From quality before recovery to the confirmed one.</p>',
        facts(calibration, "too few confirmations yet"),
    ]
    return section("Accuracy of the predictions", "".join(parts))


def _events(view: StudyView) -> str:
    rows = [
        [f'<span class="nowrap">{escape(minute(e.at))}</span>', escape(e.kind), escape(e.text)]
        for e in reversed(view.events[-LAST_EVENTS:])
    ]
    title = f"Last events ({len(rows)} of {len(view.events)})"
    return section(title, table(["when (UTC)", "kind", "what"], rows) if rows else '<p class="quiet">None.</p>')


def _origin(view: StudyView) -> str:
    """Everything needed to repeat the study."""
    meta = view.meta
    named_facts = (
        ("Settings", "spec"),
        ("Profile", "profile"),
        ("Teacher", "teacher"),
        ("Corpus", "corpus"),
        ("Elastic student", "elastic"),
        ("Machine", "machine"),
        ("Versions", "versions"),
    )
    blocks = [
        f"<details><summary>{title}</summary>{facts(meta[name], '')}</details>"
        for title, name in named_facts
        if meta.get(name)
    ]
    command = meta.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    seed = "" if meta.get("seed") is None else f" (seed {escape(str(meta['seed']))})"
    repeat = f"<h3>Reproduce{seed}</h3><pre>{escape(str(command))}</pre>" if command else ""
    return section("Provenance", "".join(blocks) + repeat)
