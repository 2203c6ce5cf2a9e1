"""The command that scores a teacher as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.terminal.console import print_json, print_text
from paretune.cli.terminal.options import HOME, Home, Json
from paretune.common.errors import UsageError

if TYPE_CHECKING:
    from paretune.teachers.text.corpus import Split


def score(
    teacher: Annotated[str, typer.Option(help="stdlib-coder or a Hugging Face folder.")] = "stdlib-coder",
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Number of processes that share the weights; must divide KV heads and FFN width.")
    ] = 1,
    data: Annotated[
        str | None,
        typer.Option(help="Your text: a text file, records (.jsonl, .json, .csv, .tsv, .parquet) or a folder of them."),
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Text field of records; keys joined by dots for a nested one.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Part of the text: report (confirmations), search or calibration.")
    ] = "report",
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Use about this many tokens, taken evenly from the text.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds after which the processes are stopped.")] = 3600.0,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Score a teacher in float32 torch: NLL with an interval over documents, in one process or in several."""
    from paretune.objectives.quality.score import score_teacher
    from paretune.teachers.checkpoint.shards import check_degree
    from paretune.teachers.checkpoint.teacher import load_teacher
    from paretune.teachers.text.corpus import chosen_corpus
    from paretune.teachers.text.own_output import mark_home
    from paretune.teachers.text.tokens import token_split

    wanted = _split(split)
    found = load_teacher(teacher)
    check_degree(found.shape, tensor_parallel)  # before any text is read
    mark_home(home.resolve())
    corpus = chosen_corpus(data, field)
    text = token_split(found, corpus, wanted, home.resolve() / "cache")
    scores, measurements = score_teacher(found, text, tensor_parallel, timeout, tokens)
    if json:
        print_json(
            {
                "teacher": found.name,
                "tensor_parallel": tensor_parallel,
                "split": wanted,
                "measurements": {name: m.to_dict() for name, m in measurements.items()},
                "documents": [
                    {"name": name, "nll": nll / n, "targets": n}
                    for name, nll, n in zip(scores.documents, scores.nll, scores.targets, strict=True)
                    if n
                ],
            }
        )
        return
    for name, m in measurements.items():
        unit = "" if m.unit == "1" else f" {m.unit}"
        line = f"{name}: {m.value:.4f} [{m.low:.4f} … {m.high:.4f}]{unit}"
        print_text(f"{line} ({m.note}, {m.samples:,} tokens)")


def _split(name: str) -> Split:
    if name in ("report", "search", "calibration"):
        return name  # type: ignore[return-value]
    raise UsageError(f"--split must be report, search or calibration, but got {name!r}", "leave it out for report")
