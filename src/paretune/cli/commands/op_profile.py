"""The command that profiles a teacher or an artifact."""

from __future__ import annotations

import json as json_text
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from paretune.cli.terminal.console import note, print_json, print_text, screen, show, spinner, talk
from paretune.cli.terminal.options import HOME, Home, Json
from paretune.cli.terminal.table import Column, FittedTable
from paretune.common.command_line import short

if TYPE_CHECKING:
    from paretune.objectives.profiler.op_profile import OpProfile

MOST_OPS = 12
# Read when torch is imported: its profiler talks on stderr about itself.
QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def op_profile(
    model: Annotated[str, typer.Argument(help="stdlib-coder, a Hugging Face folder, or the folder of an artifact.")],
    profile: Annotated[str, typer.Option(help="Target: a name or a YAML file.")] = "local-cpu",
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prefill.")] = 128,
    tokens: Annotated[int, typer.Option(min=4, help="Decode steps after it.")] = 24,
    out: Annotated[
        Path | None, typer.Option(help="Write profile.json, profile.html and profile.svg into this folder.")
    ] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Show where a model's time goes, op by op, and where compression would pay; later searches of it start there."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from paretune.objectives.profiler.run import ProfileRequest, local_profile_named, profile_ops
    from paretune.tracking.mlflow.op_profile import log_profile

    target = local_profile_named(profile, home.resolve())
    with talk.status(Text("profiling"), spinner=spinner()) as status:
        told = ProfileRequest(target, home.resolve(), prompt, tokens, lambda text: status.update(Text(text)))
        found = profile_ops(model, told)
    if json:
        print_json(found.to_dict())
    else:
        _show(found)
    with tempfile.TemporaryDirectory(prefix="paretune-") as kept:
        folder = Path(kept) if out is None else out
        _write(found, folder)
        problem = log_profile(home.resolve(), found, folder)
    if out is not None and not json:
        print_text(str(short(out.resolve() / "profile.html")))
    if problem:
        note(f"the op profile is not in MLflow: {problem}")


def _write(found: OpProfile, folder: Path) -> None:
    from paretune.common.file_access import unwritable
    from paretune.common.files import write_atomically
    from paretune.tracking.charts.op_profile_picture import profile_picture
    from paretune.tracking.report.op_profile_page import profile_html

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "profile.json", json_text.dumps(found.to_dict(), indent=1).encode())
        write_atomically(folder / "profile.html", profile_html(found).encode())
        profile_picture(found, folder / "profile.svg")
    except OSError as error:
        raise unwritable(folder, error, "choose a writable folder with --out", "the op profile in") from None


def _show(found: OpProfile) -> None:
    """Tables on stdout."""
    out = screen()
    m, s = found.measurements, found.settings
    print_text(f"{found.subject.name}: {found.subject.description}")
    print_text(
        f"{s['profile']}, {s['engine']}, {s['threads']} thread(s): TTFT ({s['prompt']} tokens) {show(m['ttft_ms'])} ms, "
        f"decode {show(m['decode_ms_per_token'])} ms/token, {m['throughput_tokens_per_s'].value:.0f} tokens/s, "
        f"memory {show(m['peak_memory_bytes'], 'MB')} MB"
    )
    roof = found.roof
    print_text(
        f"roofline: {roof.bandwidth_gb_per_s:.1f} GB/s, fp32 {roof.fp32_gflop_per_s:.0f} GFLOP/s, "
        f"int8 {roof.int8_gop_per_s:.0f} GOP/s ({roof.source})"
    )
    for phase in ("decode", "prefill"):
        out.print(_ops(found, phase))
    out.print(_layers(found))
    for phase, seen in found.torch.items():
        top = ", ".join(f"{op.op} {op.ms:.3f} ms" for op in seen.ops[:4])
        print_text(f"in torch, {phase}: {seen.ms:.3f} ms; most in {top}")
    out.print(_places(found))
    for told in found.notes:
        note(told)


def _ops(found: OpProfile, phase: str) -> FittedTable:
    columns = (
        Column("op", right=False),
        Column("nodes", rank=4),
        Column("ms"),
        Column("share", rank=1),
        Column("MB", rank=3),
        Column("MFLOP", rank=6),
        Column("ops/byte", rank=7),
        Column("of the roof", rank=2),
        Column("bound by", right=False, rank=5),
    )
    rows: list[tuple[str, ...]] = []
    for t in found.totals(phase, "ops")[:MOST_OPS]:
        figures = (
            f"{t.ms:.4f}",
            f"{t.share:.1%}",
            f"{t.bytes / 1e6:.3f}",
            f"{t.flops / 1e6:.2f}",
            f"{t.intensity:.2f}",
        )
        rows.append((t.label, str(t.count), *figures, f"{t.efficiency:.0%}", t.bound))
    rows.append(("between ops", "", f"{found.between_ms(phase):.4f}", *[""] * 6))
    return FittedTable(columns, tuple(rows), f"{phase} by fused op")


def _layers(found: OpProfile) -> FittedTable:
    columns = (
        Column("layer", right=False),
        Column("decode ms"),
        Column("share", rank=1),
        Column("MB", rank=4),
        Column("of the roof", rank=3),
        Column("prefill ms", rank=2),
    )
    rows = []
    prefill = {t.label: t.ms for t in found.totals("prefill", "layers")}
    for t in sorted(found.totals("decode", "layers"), key=lambda t: _order(t.label)):
        figures = (f"{t.ms:.4f}", f"{t.share:.1%}", f"{t.bytes / 1e6:.3f}", f"{t.efficiency:.0%}")
        rows.append((t.label, *figures, f"{prefill.get(t.label, 0.0):.3f}"))
    return FittedTable(columns, tuple(rows), "by layer")


def _order(layer: str) -> int:
    """In the order of execution."""
    known = {"embedding": -1, "head": 10**6, "other": 10**6 + 1}
    return known[layer] if layer in known else int(layer.removeprefix("layer "))


def _places(found: OpProfile) -> FittedTable:
    columns = (
        Column("change", right=False, folds=True),
        Column("decode ms saved"),
        Column("interval", rank=1),
        Column("TTFT ms saved", rank=2),
        Column("MB less per token", rank=3),
    )
    rows = []
    for p in found.best:
        interval = f"{p.decode_ms.low:.4f} … {p.decode_ms.high:.4f}"
        saved = (f"{p.decode_ms.value:.4f}", interval, f"{p.ttft_ms.value:.3f}", f"{p.read_bytes / 1e6:.3f}")
        rows.append((p.text, *saved))
    return FittedTable(columns, tuple(rows), "where compression would pay (predicted)")
