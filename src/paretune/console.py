"""What people see: tables and progress on stderr, data on stdout."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from paretune.objectives.measurement import Measurement
    from paretune.search.view import Point, StudyView

talk = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 140)
# Columns of the front for what is an objective only where the settings say so.
FURTHER = {
    "throughput_tokens_per_s": "tokens/s",
    "energy_j_per_token": "J/token",
    "usd_per_million_tokens": "USD/M tokens",
}
STAGES = {
    "baselines": "confirming the baselines",
    "fit": "measuring for the latency fit",
    "elastic": "training the elastic student",
    "explore": "exploring",
    "confirm": "recovering and confirming",
}


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def print_text(text: str) -> None:
    sys.stdout.write(text + "\n")


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


def front_table(view: StudyView, title: str = "") -> Table:
    """The front as a table, best quality first."""
    table = Table(
        title=title or None,
        caption="interval: 95 %; = tied with the member named; loss against the fp32 teacher",
        caption_justify="left",
    )
    figures = view.figures
    quality = "NLL" if figures.is_decoder else figures.quality.replace("_", " ")
    times = ["decode ms", "TTFT ms"] if figures.is_decoder else ["forward ms"]
    further = [name for name in view.objectives if name in FURTHER]
    titles = [FURTHER[name] for name in further]
    for name in ("candidate", "key", quality, "loss", *times, *titles, "MB zstd", "peak MB", ""):
        justify: Literal["left", "right"] = "left" if name in ("candidate", "key", "") else "right"
        table.add_column(name, justify=justify, no_wrap=name in ("key", times[0]))
    for point in view.front:
        m = point.measurements
        tie = f"= {view.ties[point.key][:8]}" if point.key in view.ties else ""
        table.add_row(
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
    return table


def duration(seconds: float) -> str:
    """Short words for a time span: 45 s, 12 min, 7 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"


class Progress:
    """Live lines of a search: a status line on a terminal, one line per event in a log."""

    def __init__(self, budget_s: float, spent_s: float) -> None:
        self.budget_s, self.start = budget_s, time.monotonic() - spent_s
        self.status = talk.status("starting") if talk.is_terminal else None
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

    def say(self, text: str) -> None:
        """One line that stays."""
        talk.print(f"[dim]{duration(time.monotonic() - self.start):>7}[/dim]  {text}", soft_wrap=True)

    def update(self, doing: str, every_s: float = 15.0) -> None:
        """What is going on; in a log at most every `every_s` seconds."""
        left = max(0.0, self.budget_s - (time.monotonic() - self.start))
        best = f", best so far {self.best}" if self.best else ""
        text = f"{doing} · {self.explored} explored, {self.confirmed} confirmed, front {self.front_size}{best} · ends in {duration(left)} at the latest"
        if self.status is not None:
            self.status.update(text)
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
            doubt = " [yellow](disturbed)[/yellow]" if m[latency].provenance == "disturbed" else ""
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
        progress.update(f"measuring for the latency fit, {data.get('missing', 0)} to go")
    elif kind == "fit":
        error = data.get("decode_ms_per_token") or data.get("forward_ms")
        if error:
            progress.say(
                f"latency fit: held-out error {error['median']:.1%} median, {error['worst']:.1%} worst, Kendall tau {error['kendall_tau']:.2f} "
                f"(parameters x bits: {error['params_bits_tau']:.2f})"
            )
    elif kind == "elastic" and data.get("trained") is False:
        progress.say(f"training speed {data['tokens'] / max(data['elapsed_s'], 1e-9):,.0f} examples/s")
    elif kind == "elastic":
        progress.say(
            "elastic student "
            + (
                "taken from an earlier search"
                if data.get("kept")
                else f"trained on {data.get('tokens', 0):,.0f} tokens"
            )
        )
    elif kind == "sensitivity":
        why = f"not searched: {data['reason']}" if data["reason"] else "opened by what each layer loses in each format"
        progress.say(f"mixed precision {why}")
    elif kind == "rung0":
        progress.explored += data["status"] == "complete"
        progress.update("exploring")
    elif kind == "recovered":
        progress.update("recovering a finalist")
    elif kind == "lost":
        progress.say(f"[yellow]{data['kind']} lost: {data['reason']}[/yellow]")
    if data.get("status") in ("failed", "infeasible"):
        progress.failed += 1
        progress.say(f"[yellow]{kind} {data['status']}: {str(data['reason'])[:200]}[/yellow]")


def program() -> str:
    """How this shell would call us again, quoted."""
    if shutil.which("paretune"):
        return "paretune"
    if Path(sys.argv[0]).name == "__main__.py":
        return "python -m paretune"
    return shlex.quote(str(short(Path(sys.argv[0]).absolute())))


def short(path: Path) -> Path:
    """Relative to the working directory where that is shorter."""
    with contextlib.suppress(ValueError):
        return path.relative_to(Path.cwd())
    return path
