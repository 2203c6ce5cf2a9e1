"""The report: one self-contained page of a study, for a browser without a network, on a screen or a phone.

Everything is read from the view. All text is escaped; a content security policy forbids the page to load anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from paretune.hardware_profiles.errors import ParetuneError
from paretune.hardware_profiles.files import write_atomically
from paretune.search.recommend import Recommendation
from paretune.search.store import Store
from paretune.search.view import Point, StudyView, failure_counts
from paretune.tracking.charts import (
    PLOTLY_CONFIG,
    front_figure,
    front_png,
    hidden_estimates,
    is_disturbed,
    measurement,
    named,
    plain,
    recommended,
)

COLUMNS = (
    ("nll", "NLL (nats/token)"),
    ("relative_loss", "loss vs fp32 teacher"),
    ("decode_ms_per_token", "decode per token"),
    ("ttft_ms", "TTFT, 128 tokens"),
    ("peak_memory_bytes", "peak memory"),
    ("compressed_bytes", "compressed"),
)
STATES = {
    "complete": "complete",
    "interrupted": "interrupted, can be resumed",
    "running": "running",
    "failed": "failed",
}
LAST_EVENTS = 25
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


def write_report(view: StudyView) -> None:
    """Write report.html and front.png into the study's folder, each atomically."""
    front_png(view, view.folder / "front.png")
    write_atomically(view.folder / "report.html", report_html(view).encode())


def report_html(view: StudyView) -> str:
    """The page, about 5 MB because plotly.js is in it. A study without any confirmed or scored candidate is fine."""
    from plotly.offline import get_plotlyjs

    chosen = recommended(view)
    parts = [_head(view), _headline(view, chosen), _chart(view), _front_table(view, chosen), _baseline_table(view)]
    parts += [_disturbed_table(view), _effort(view), _failures(view), _trust(view), _events(view), _origin(view)]
    body, title = "\n".join(parts), escape(view.study)
    return PAGE.format(title=title, body=body, style=STYLE, plotly=get_plotlyjs(), theme=THEME_SCRIPT, policy=POLICY)


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A settings mapping as (dotted name, text) rows; lists on one line, None as a dash."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in flat(item, f"{prefix}.{key}" if prefix else str(key))]
    return [] if value is None and not prefix else [(prefix or "value", _text(value))]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(_text(v) for v in value) if isinstance(value, list | tuple) else str(value)


def _head(view: StudyView) -> str:
    meta = view.meta
    state = str(meta.get("state") or "running")
    label = STATES.get(state, state) + (f": {meta['stage']}" if state == "running" and meta.get("stage") else "")
    facts = f"{named(meta.get('teacher'))} for {named(meta.get('profile'))}, started {_minute(meta.get('created'))}"
    badge = f'<span class="state {escape(state)}">{escape(label)}</span>'
    return f'<header><h1>{escape(view.study)}</h1> {badge}<p class="quiet">{escape(facts)}</p></header>'


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
        "<code>paretune recommend</code> a limit to get the best within it.</p>"
    )
    body = f"<p>{escape(point.description)}</p><ul>{reasons}{price}</ul>{note}"
    return f'<section class="answer">{title}{body}</section>'


def _chart(view: StudyView) -> str:
    if not view.rung0 and not view.confirmed:
        return _section("Front", '<p class="quiet">Nothing is scored yet.</p>')
    figure = front_figure(view).to_html(full_html=False, include_plotlyjs=False, div_id="front", config=PLOTLY_CONFIG)
    hidden = hidden_estimates(view)
    more = f" {hidden} estimates lie outside the first view; double-click shows everything." if hidden else ""
    note = (
        '<p class="quiet">Solid: confirmed, measured, with 95 % intervals (of the NLL: paired with the teacher). '
        "Hollow: predicted at rung 0, before "
        f"recovery. The menu changes the axes.{more}</p>"
    )
    without = "<noscript><p>The chart needs JavaScript; front.png beside this page shows the same.</p></noscript>"
    return _section("Front", f'<div class="chart">{figure}</div>{without}{note}')


def _front_table(view: StudyView, chosen: Recommendation | None) -> str:
    if not view.front:
        return _section("Front members", '<p class="quiet">None is confirmed yet.</p>')
    star = None if chosen is None else chosen.chosen.key
    rows = _rows(view, view.front, star)
    note = (
        "95 % intervals: over documents for the NLL, over rounds for times; values without one are counted. "
        "The loss is paired with the teacher document by document, so its interval is much narrower than the NLL's."
    )
    if view.ties:
        note += " ≈ marks a tie: within the intervals of the named member in every objective."
    return _section("Front members", _point_table(rows) + f'<p class="quiet">{note}</p>')


def _baseline_table(view: StudyView) -> str:
    rows = _rows(view, view.baselines)
    text = '<p class="quiet">The unchanged teacher, which every student has to beat.</p>'
    return _section("Baselines", text + (_point_table(rows) if rows else '<p class="quiet">Not confirmed yet.</p>'))


def _disturbed_table(view: StudyView) -> str:
    rows = _rows(view, [p for p in view.confirmed if is_disturbed(view, p)])
    if not rows:
        return ""
    text = '<p class="quiet">Something else used the machine while these were measured, so they are not ranked.</p>'
    return _section("Disturbed", text + _point_table(rows))


def _rows(view: StudyView, points: Sequence[Point], star: str | None = None) -> list[list[str]]:
    artifacts = _artifacts(view, points)
    return [_row(view, point, star, artifacts.get(point.key)) for point in points]


def _row(view: StudyView, point: Point, star: str | None, artifact: str | None) -> list[str]:
    tie = view.ties.get(point.key)
    mark = ("★ " if point.key == star else "") + ("≈ " if tie else "")
    name = f'<b title="{escape(point.description)}">{mark}{escape(point.name)}</b><br><code>{point.key[:8]}</code>'
    if tie:
        name += f' <span class="quiet">tied with <code>{escape(tie[:8])}</code></span>'
    return [
        name,
        *(_value(point, column) for column, _ in COLUMNS),
        _provenance(point),
        f"<code>{escape(artifact)}</code>" if artifact else "–",
    ]


def _point_table(rows: Sequence[Sequence[str]]) -> str:
    return _table(["candidate", *(title for _, title in COLUMNS), "provenance", "artifact"], rows)


def _value(point: Point, name: str) -> str:
    m = measurement(point, name)
    if m is None:
        return "–"
    interval = "" if m.low == m.high else f'<br><span class="quiet">{plain(name, m.low)} … {plain(name, m.high)}</span>'
    title = escape(f"{m.provenance}, {m.samples} samples. {m.note}")
    return f'<span class="{m.provenance}" title="{title}">{plain(name, m.value)}</span>{interval}'


def _provenance(point: Point) -> str:
    """`measured`, or which columns have which provenance."""
    found: dict[str, list[str]] = {}
    for name, title in COLUMNS:
        m = measurement(point, name)
        if m is not None:
            found.setdefault(m.provenance, []).append(title.split(" (")[0].split(",")[0])
    if len(found) < 2:
        return escape(next(iter(found), "–"))
    common = max(found, key=lambda kind: len(found[kind]))
    rest = [f"{kind}: {', '.join(names)}" for kind, names in found.items() if kind != common]
    return escape(f"{'; '.join(rest)}; the rest {common}")


def _artifacts(view: StudyView, points: Sequence[Point]) -> dict[str, str]:
    """Artifact folders relative to the page, by candidate key; the view does not carry them."""
    try:
        store = Store.reader(view.folder)
    except ParetuneError:  # The study folder is gone: a page made from a view in memory still shows the numbers.
        return {}
    try:
        found = {p.key: store.artifact(p.key) for p in points}
    finally:
        store.close()
    return {key: path.relative_to(view.folder).as_posix() for key, path in found.items() if path is not None}


def _effort(view: StudyView) -> str:
    meta, spent = view.meta, view.meta.get("spent_s")
    budget = f" of {_duration(meta['budget_s'])}" if meta.get("budget_s") else ""
    space = f" of {float(meta['space_size']):.3g} possible" if meta.get("space_size") else ""
    tiles = [
        (str(len(view.rung0)), f"scored at rung 0 (estimates){space}"),
        (str(len(view.confirmed)), "confirmed (measured)"),
        (str(len(view.front)), f"on the front, {len(view.ties)} of them ties"),
        (str(len(view.failures)), "failed, infeasible or lost"),
    ]
    if spent:
        tiles.append((_duration(spent), f"spent{budget} (wall clock)"))
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles)
    return _section("Effort", f'<div class="tiles">{boxes}</div>{_stages(view)}')


def _stages(view: StudyView) -> str:
    total = sum(view.seconds_by_stage.values())
    if total <= 0:
        return ""
    rows = [
        f'<div class="stage"><span>{escape(name)}</span><i style="width:{seconds / total:.1%}"></i>'
        f"<span>{_duration(seconds)}, {seconds / total:.0%}</span></div>"
        for name, seconds in view.seconds_by_stage.items()
    ]
    return '<h3>Time per stage (measured)</h3><div class="stages">' + "".join(f"{row}" for row in rows) + "</div>"


def _failures(view: StudyView) -> str:
    if not view.failures:
        return _section("Failures", '<p class="quiet">None.</p>')
    rows = [[str(count), escape(reason)] for reason, count in failure_counts(view).most_common()]
    return _section("Failures", _table(["times", "what and why"], rows))


def _trust(view: StudyView) -> str:
    """How far the predictions can be trusted."""
    fit, calibration = view.meta.get("fit_error"), view.meta.get("calibration")
    parts = [
        '<h3>Latency fit</h3><p class="quiet">Held-out error of predicted latencies against measured ones; '
        "errors are fractions.</p>",
        _facts(fit, "no fit yet"),
        '<h3>Calibration of rung 0</h3><p class="quiet">From quality before recovery to the confirmed one.</p>',
        _facts(calibration, "too few confirmations yet"),
    ]
    return _section("How far to trust the predictions", "".join(parts))


def _events(view: StudyView) -> str:
    rows = [
        [f'<span class="nowrap">{escape(_minute(e.at))}</span>', escape(e.kind), escape(e.text)]
        for e in reversed(view.events[-LAST_EVENTS:])
    ]
    title = f"Last events ({len(rows)} of {len(view.events)})"
    return _section(title, _table(["when (UTC)", "kind", "what"], rows) if rows else '<p class="quiet">None.</p>')


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
        f"<details><summary>{title}</summary>{_facts(meta[name], '')}</details>"
        for title, name in named_facts
        if meta.get(name)
    ]
    command = meta.get("command")
    if isinstance(command, list):
        command = shlex.join(str(word) for word in command)
    seed = "" if meta.get("seed") is None else f" (seed {escape(str(meta['seed']))})"
    repeat = f"<h3>Reproduce{seed}</h3><pre>{escape(str(command))}</pre>" if command else ""
    return _section("Where it comes from", "".join(blocks) + repeat)


def _section(title: str, body: str) -> str:
    """A section; `body` is HTML that is already escaped."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on a phone; cells are HTML that is already escaped."""
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(value: Any, otherwise: str) -> str:
    rows = [[f"<code>{escape(name)}</code>", escape(text)] for name, text in flat(value)]
    return _table(["name", "value"], rows) if rows else f'<p class="quiet">{escape(otherwise)}</p>'


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def _minute(at: Any) -> str:
    """An ISO time to the second, as people write it."""
    return "–" if not at else str(at)[:19].replace("T", " ")


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title} · paretune</title><style>{style}</style>
<script>{plotly}</script></head>
<body><main>
{body}
</main><script>{theme}</script></body></html>
"""

STYLE = """
:root{--bg:#fff;--panel:#f6f8fa;--ink:#1b2127;--quiet:#5c6670;--line:#d9dee3;
  --accent:#0b7d5c;--bad:#b3261e;--warn:#9a5b00}
@media (prefers-color-scheme:dark){:root{--bg:#14181c;--panel:#1d2328;--ink:#e6eaee;--quiet:#9aa5af;--line:#343c44;
  --accent:#4fd0a6;--bad:#ff8a80;--warn:#f0b35a}}
*{box-sizing:border-box}
html{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
body{margin:0}
main{max-width:1380px;margin:0 auto;padding:1.2rem 1rem 4rem}
h1{font-size:1.7rem;margin:.2rem .6rem .2rem 0;display:inline-block;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.3rem 0}
.quiet{color:var(--quiet);font-size:.87em}
.nowrap,td .quiet,td:first-child b{white-space:nowrap}
.state{display:inline-block;border:1px solid currentColor;border-radius:1rem;padding:.05rem .7rem;font-size:.85rem;
  vertical-align:.3rem;color:var(--warn)}
.state.complete{color:var(--accent)}
.state.failed{color:var(--bad)}
.answer{background:var(--panel);border-left:4px solid var(--accent);border-radius:6px;padding:.8rem 1rem;
  margin-top:1rem;overflow-wrap:anywhere}
.answer h2{margin:0 0 .3rem}
.answer ul{margin:.5rem 0;padding-left:1.2rem}
.chart{margin:0 -.5rem;min-height:680px}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:6px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.4rem .7rem;vertical-align:top;border-top:1px solid var(--line)}
thead th{border-top:0;background:var(--panel);font-size:.85em;white-space:nowrap}
td:last-child code{display:inline-block;min-width:9rem;overflow-wrap:anywhere}
code,pre{font:.88em ui-monospace,monospace}
pre{background:var(--panel);padding:.8rem;border-radius:6px;overflow-x:auto}
.disturbed{color:var(--bad);font-weight:600}
.predicted,.table{font-style:italic}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.6rem}
.tiles div{background:var(--panel);border-radius:6px;padding:.6rem .8rem}
.tiles b{display:block;font-size:1.4rem}
.tiles span{color:var(--quiet);font-size:.85rem}
.stage{display:grid;grid-template-columns:minmax(7rem,12rem) 1fr 8.5rem;gap:.6rem;align-items:center;font-size:.9rem;
  margin:.15rem 0}
.stage i{height:.8rem;background:var(--accent);border-radius:3px;min-width:2px}
details{border:1px solid var(--line);border-radius:6px;margin:.4rem 0;padding:.4rem .7rem}
summary{cursor:pointer}
details .wide{margin:.5rem 0;border:0}
@media (max-width:600px){main{padding:.6rem .6rem 3rem}.stage{grid-template-columns:6.5rem 1fr 6.5rem}
  th,td{padding:.35rem .5rem}td:first-child b{white-space:normal}}
"""

THEME_SCRIPT = """
(() => {
  const chart = document.getElementById('front'), dark = matchMedia('(prefers-color-scheme: dark)');
  if (!chart || !window.Plotly) return;
  const paint = () => {
    const ink = dark.matches ? '#c3ccd4' : '#3c454d', narrow = innerWidth < 600;
    Plotly.relayout(chart, {'font.color': ink, 'font.size': narrow ? 11 : 13,
      'margin.l': narrow ? 46 : 70, 'margin.r': narrow ? 8 : 16,
      'margin.t': narrow ? 132 : 92, 'coloraxis.colorbar.y': narrow ? 1.14 : 1.03, 'xaxis.nticks': narrow ? 5 : 0,
      'xaxis.linecolor': ink, 'yaxis.linecolor': ink, 'coloraxis.colorbar.len': narrow ? 0.9 : 0.42});
  };
  paint();
  dark.addEventListener('change', paint);
})();
"""
