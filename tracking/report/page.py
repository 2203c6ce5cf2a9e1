"""The frame of the report's page: its HTML, style and script, and what sections, tables and times look like in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)


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


def section(title: str, body: str) -> str:
    """A section; `body` is HTML that is already escaped."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on a phone; cells are HTML that is already escaped."""
    head = "".join(f"<th>{escape(title)}</th>" for title in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(value: Any, otherwise: str) -> str:
    """Return a mapping as an HTML table of names and values; the text `otherwise` if it has none."""
    rows = [[f"<code>{escape(name)}</code>", escape(text)] for name, text in flat(value)]
    return table(["name", "value"], rows) if rows else f'<p class="quiet">{escape(otherwise)}</p>'


def duration(seconds: float) -> str:
    """Return a time span in words: `4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole % 60:02d} s"


def minute(at: Any) -> str:
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
.reason{border:0;padding:0;margin:0;max-width:20rem;color:var(--quiet);font-size:.87em}
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
