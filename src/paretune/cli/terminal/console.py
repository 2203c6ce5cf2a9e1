"""What people see: tables and progress on stderr, data on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from paretune.cli.terminal.table import Column, FittedTable

if TYPE_CHECKING:
    from paretune.objectives.measurement import Measurement
    from paretune.search.study.view import Point, StudyView

# As wide as any table of ours: what is piped is read by programs, which take no columns away.
PIPE_WIDTH = 1000


def width_of(stream: IO[str]) -> int | None:
    """Columns of what `stream` leads to: COLUMNS, or the terminal's own (None: rich asks it), or enough for everything in a pipe."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return None if stream.isatty() else PIPE_WIDTH


def screen() -> Console:
    """stdout for tables. Texts are shown as they are: no markup, no emoji codes, no highlighting."""
    return Console(highlight=False, markup=False, emoji=False, width=width_of(sys.stdout))


talk = Console(stderr=True, highlight=False, markup=False, emoji=False, width=width_of(sys.stderr))
# Columns of the front for what is an objective only where the settings say so.
FURTHER = {
    "throughput_tokens_per_s": "tokens/s",
    "energy_j_per_token": "J/token",
    "usd_per_million_tokens": "USD/M tokens",
}


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def print_text(text: str) -> None:
    """Write a text and a newline to stdout."""
    sys.stdout.write(text + "\n")


def say(*parts: str | tuple[str, str]) -> None:
    """One line of talk on stderr; a part is a text, shown as it is, or a text with a style such as ("note:", "yellow")."""
    talk.print(Text.assemble(*parts), soft_wrap=True)


def note(text: str) -> None:
    """Print a note on stderr."""
    say(("note:", "yellow"), f" {text}")


def tell_problem(problem: str, remedy: str = "") -> None:
    """A refusal or a bad end: the reason, then what to do."""
    say(("error:", "red"), f" {problem}")
    if remedy:
        say(("remedy:", "green"), f" {remedy}")


def show_all_characters() -> None:
    """Whatever the locale: what stdout and stderr cannot show is replaced, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def show(m: Measurement | None, kind: str = "") -> str:
    """Value with the half-width of its interval; a mark for what was not measured."""
    if m is None:
        return "-"
    mark = {"predicted": " (predicted)", "disturbed": " (disturbed)", "table": " (table)"}.get(m.provenance, "")
    if kind == "MB":
        return f"{m.value / 1e6:.2f}{mark}"
    if kind == "%":
        return f"{m.value:+.1%} ±{(m.high - m.low) / 2:.1%}{mark}"
    if kind == "g":
        return f"{m.value:.4g} ±{(m.high - m.low) / 2:.2g}{mark}"
    half = (m.high - m.low) / 2
    return f"{m.value:.3f}" + (f" ±{half:.3f}" if half else "") + mark


def front_table(view: StudyView, title: str = "") -> FittedTable:
    """The front as a table, best quality first."""
    figures = view.figures
    quality = "NLL" if figures.is_decoder else figures.quality.replace("_", " ")
    times = ["decode ms", "TTFT ms"] if figures.is_decoder else ["forward ms"]
    further = [name for name in view.objectives if name in FURTHER]
    titles = [FURTHER[name] for name in further]
    columns = [
        Column("candidate", right=False, folds=True),
        Column("key", right=False),
        Column(quality, rank=4),
        Column("loss"),
        *(Column(name, rank=1 + 4 * number) for number, name in enumerate(times)),
        *(Column(name, rank=3) for name in titles),
        Column("MB zstd", rank=2),
        Column("peak MB", rank=6),
        Column("tie", right=False, rank=7),
    ]
    rows = []
    for point in view.front:
        m = point.measurements
        tie = f"= {view.ties[point.key][:8]}" if point.key in view.ties else ""
        rows.append(
            (
                point.name,
                point.key[:8],
                f"{m[figures.quality].value:.{3 if figures.is_decoder else 5}f}",
                show(m.get("relative_loss"), "%"),
                *(show(m.get(time)) for time, _ in figures.latencies),
                *(show(m.get(name), "g") for name in further),
                show(m.get("compressed_bytes"), "MB"),
                show(m.get("peak_memory_bytes"), "MB"),
                tie,
            )
        )
    caption = "95 % intervals; = is a statistical tie with the member named; loss against the fp32 teacher"
    return FittedTable(tuple(columns), tuple(rows), title, caption)


def duration(seconds: float) -> str:
    """Short words for a time span: 45 s, 12 min, 7 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


class Progress:
    """Live lines of a search: a status line on a terminal, one line per event in a log."""

    def __init__(self, budget_s: float, spent_s: float) -> None:
        self.budget_s, self.start = budget_s, time.monotonic() - spent_s
        self.status = talk.status(Text("starting"), spinner=spinner()) if talk.is_terminal else None
        self.explored = self.confirmed = self.failed = 0
        self.front_size, self.best = 0, ""
        self._last_line = 0.0

    def __enter__(self) -> Progress:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def say(self, text: str, style: str = "") -> None:
        """One line that stays."""
        say((f"{duration(time.monotonic() - self.start):>7}", "dim"), "  ", (text, style))

    def update(self, doing: str, every_s: float = 15.0) -> None:
        """What is going on; in a log at most every `every_s` seconds."""
        left = max(0.0, self.budget_s - (time.monotonic() - self.start))
        best = f", best so far {self.best}" if self.best else ""
        counts = f"{self.explored} explored, {self.confirmed} confirmed, front {self.front_size}"
        text = f"{doing} · {counts}{best} · ends in {duration(left)} at the latest"
        if self.status is not None:
            self.status.update(Text(text))
        elif time.monotonic() - self._last_line > every_s:
            self._last_line = time.monotonic()
            self.say(text)

    def saw_confirmation(self, view: StudyView, key: str) -> None:
        """Say what was confirmed; keep the size of the front (ties count once) and the fastest member within 3 % loss."""
        self.confirmed = len(view.confirmed)
        self.front_size = len(view.front) - len(view.ties)
        latency, unit = view.figures.latencies[0]
        near = [p for p in view.front if p.measurements["relative_loss"].value <= 0.03]
        if near:
            fastest: Point = min(near, key=lambda p: p.measurements[latency].value)
            self.best = f"{fastest.measurements[latency].value:.3f} {unit} at {fastest.measurements['relative_loss'].value:+.1%}"
        point = view.point(key)
        if point is not None:
            m = point.measurements
            doubt = " (disturbed)" if m[latency].provenance == "disturbed" else ""
            self.say(
                f"confirmed {point.name}: {m['relative_loss'].value:+.1%} loss, "
                f"{m[latency].value:.3f} {unit}{doubt}, {m['compressed_bytes'].value / 1e6:.2f} MB"
            )


def handle(progress: Progress, kind: str, data: Mapping[str, Any]) -> None:
    """One notification of the director as lines for people."""
    if kind == "progress" and data["kind"] == "elastic":
        loss = "" if data.get("loss") is None else f", KL {data['loss']:.3f}"
        progress.update(f"training the elastic student {data['elapsed_s']:.0f}/{data['seconds']:.0f} s{loss}")
    elif kind == "progress":
        progress.update(f"measuring for the latency fit, {data.get('missing', 0)} left")
    elif kind == "fit":
        error = data.get("decode_ms_per_token") or data.get("forward_ms")
        if error:
            progress.say(
                f"latency fit: held-out error {error['median']:.1%} median, {error['worst']:.1%} worst, "
                f"Kendall tau {error['kendall_tau']:.2f} (parameters x bits: {error['params_bits_tau']:.2f})"
            )
    elif kind == "elastic" and data.get("trained") is False:
        progress.say(f"training speed {data['tokens'] / max(data['elapsed_s'], 1e-9):,.0f} examples/s")
    elif kind == "elastic":
        progress.say(
            "elastic student "
            + (
                "reused from an earlier search"
                if data.get("kept")
                else f"trained on {data.get('tokens', 0):,.0f} tokens"
            )
        )
    elif kind == "sensitivity":
        why = f"not searched: {data['reason']}" if data["reason"] else "enabled by the sensitivity table"
        progress.say(f"mixed precision {why}")
    elif kind == "rung0":
        progress.explored += data["status"] == "complete"
        progress.update("exploring")
    elif kind == "recovered":
        progress.update("recovering a finalist")
    elif kind == "lost":
        progress.say(f"{data['kind']} lost: {data['reason']}", "yellow")
    if data.get("status") in ("failed", "infeasible"):
        progress.failed += 1
        progress.say(f"{kind} {data['status']}: {str(data['reason'])[:200]}", "yellow")


def spinner() -> str:
    """One that the terminal's encoding can show."""
    return "dots" if talk.encoding.startswith("utf") else "line"
