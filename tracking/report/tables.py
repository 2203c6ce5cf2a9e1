"""The report's tables of confirmed points."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from paretune.common.errors import ParetuneError
from paretune.objectives.metric_names import MetricNames
from paretune.search.recommend.recommend import Recommendation
from paretune.search.study.store import Store
from paretune.search.study.view import Point, StudyView, label_of
from paretune.tracking.report.page import section, table
from paretune.tracking.wording import is_disturbed, measurement, plain, told

COLUMNS = (
    ("nll", "NLL (nats/token)"),
    ("relative_loss", "loss vs fp32 teacher"),
    ("decode_ms_per_token", "decode per token"),
    ("ttft_ms", "TTFT, 128 tokens"),
    ("peak_memory_bytes", "peak memory"),
    ("compressed_bytes", "compressed"),
)


def columns_of(figures: MetricNames, objectives: Sequence[str] = ()) -> tuple[tuple[str, str], ...]:
    """Measurements of a table with their titles; every one of the objectives is among them."""
    columns = _usual_columns(figures)
    shown = {name for name, _ in columns}
    return *columns, *((name, label_of(name, figures)) for name in objectives if name not in shown)


def _usual_columns(figures: MetricNames) -> tuple[tuple[str, str], ...]:
    if figures.is_decoder:
        return COLUMNS
    titles = {
        "relative_loss": "loss vs fp32 teacher",
        "peak_memory_bytes": "peak memory",
        "compressed_bytes": "compressed",
    }
    return tuple((name, titles.get(name) or label_of(name, figures)) for name in told(figures))


def front_table(view: StudyView, chosen: Recommendation | None) -> str:
    """Return the report's section on the front's members as HTML; the `chosen` one has a star."""
    if not view.front:
        return section("Front members", '<p class="quiet">None is confirmed yet.</p>')
    star = None if chosen is None else chosen.chosen.key
    rows = _rows(view, view.front, star)
    quality, unit = ("NLL", "document") if view.figures.is_decoder else ("quality", "example")
    note = (
        f"95 % intervals: over {unit}s for the {quality}, over rounds for times; values without one are counted. "
        f"The loss is paired with the teacher {unit} by {unit}, so its interval is much narrower than that of the {quality}."
    )
    if view.ties:
        note += " ≈ marks a statistical tie with the member named: the difference is within its interval in every objective."
    return section("Front members", _point_table(view, rows) + f'<p class="quiet">{note}</p>')


def baseline_table(view: StudyView) -> str:
    """Return the report's section on the baselines as HTML."""
    rows = _rows(view, view.baselines)
    text = '<p class="quiet">The unchanged teacher, which every student has to beat.</p>'
    return section(
        "Baselines", text + (_point_table(view, rows) if rows else '<p class="quiet">Not confirmed yet.</p>')
    )


def disturbed_table(view: StudyView) -> str:
    """Return the report's section on disturbed candidates as HTML; empty if there are none."""
    rows = _rows(view, [p for p in view.confirmed if is_disturbed(view, p)])
    if not rows:
        return ""
    text = '<p class="quiet">Something else used the machine while these were measured, so they are not ranked.</p>'
    return section("Disturbed", text + _point_table(view, rows))


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
        name + _training(point),
        *(_value(point, column) for column, _ in columns_of(view.figures, view.objectives)),
        _provenance(point),
        f"<code>{escape(artifact)}</code>" if artifact else "–",
    ]


def _training(point: Point) -> str:
    """Whether a student was trained under its rounding; the reason, a long sentence, folds out below the name."""
    reason = point.facts.get("qat_reason")
    if not reason or point.source == "baseline":
        return ""
    kind = "QAT" if point.facts.get("qat") else "no QAT"
    return f'<details class="reason"><summary>{kind}, why</summary>{kind}: {escape(str(reason))}</details>'


def _point_table(view: StudyView, rows: Sequence[Sequence[str]]) -> str:
    titles = (title for _, title in columns_of(view.figures, view.objectives))
    return table(["candidate", *titles, "provenance", "artifact"], rows)


def _value(point: Point, name: str) -> str:
    m = measurement(point, name)
    if m is None:
        return "–"
    interval = (
        ""
        if m.low == m.high
        else f'<br><span class="quiet">{plain(name, m.low, m.unit)} … {plain(name, m.high, m.unit)}</span>'
    )
    title = escape(f"{m.provenance}, {m.samples} samples. {m.note}")
    return f'<span class="{m.provenance}" title="{title}">{plain(name, m.value, m.unit)}</span>{interval}'


def _provenance(point: Point) -> str:
    """`measured`, or which columns have which provenance."""
    found: dict[str, list[str]] = {}
    for name, title in columns_of(point.figures):
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
