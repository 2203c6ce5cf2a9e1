"""The commands that work on an artifact: let it write, measure it again."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paretune.cli.terminal.console import print_json, print_text, say
from paretune.cli.terminal.options import HOME, Home, Json, fraction, numbers
from paretune.common.errors import UsageError

if TYPE_CHECKING:
    from paretune.objectives.artifacts.remeasure import Remeasured
    from paretune.objectives.artifacts.sweeping import Swept


def generate(
    artifact: Annotated[Path, typer.Argument(readable=False, help="Folder of an artifact.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 1,
    json: Json = False,
) -> None:
    """Generate text with an artifact through onnxruntime-genai and print the speed."""
    from paretune.engines.onnxruntime.generate import require_text, stream

    require_text(prompt)  # before it is echoed

    with contextlib.closing(stream(artifact, prompt, max_tokens, temperature, threads)) as pieces:
        text = ""
        if not json:
            sys.stdout.write(prompt)
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                if not json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                continue
            if json:
                print_json({"prompt": prompt, "text": text, **piece.__dict__})
            else:
                print_text("")
                say(
                    f"{piece.tokens} tokens, {piece.tokens_per_second:.0f} tokens/s, "
                    f"first token after {piece.ttft_ms:.1f} ms, {threads} thread(s)"
                )


def measure(
    artifact: Annotated[Path, typer.Argument(readable=False, help="Folder of an artifact.")],
    profile: Annotated[str, typer.Option(help="Target: a name or a YAML file.")] = "local-cpu",
    agent: Annotated[
        str | None, typer.Option(help="URL of a `paretune agent`, which measures on its own machine.")
    ] = None,
    within: Annotated[str, typer.Option(help="Half-width of the 95 % intervals to reach.")] = "3%",
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure several prompt and context lengths and batch sizes instead.")
    ] = False,
    prompts: Annotated[str | None, typer.Option(help="Prompt lengths of the sweep such as 32,128.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Context lengths of the sweep's decode such as 128,512.")] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes of the sweep's decode such as 1,8.")] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Run the latency benchmark on an artifact again and say whether it agrees with its study.

    On a machine too busy for that the values are printed as disturbed, and the exit code is 5.
    """
    if sweep and agent is not None:
        raise UsageError("a sweep is made on this machine, but got --agent", "leave one of the two out")
    if sweep:
        from paretune.objectives.artifacts.sweeping import sweep_artifact

        lengths = (numbers(prompts, "--prompts"), numbers(contexts, "--contexts"), numbers(batches, "--batches"))
        _tell(sweep_artifact(artifact, profile, home.resolve(), *lengths), json)
        return
    if prompts or contexts or batches:
        raise UsageError("--prompts, --contexts and --batches belong to a sweep", "add --sweep")
    from paretune.objectives.artifacts.remeasure import remeasure

    wanted = fraction(within, "--within") or 0.0
    if wanted >= 1:
        raise UsageError(f"--within must be below 100%, but got {within!r}", "write a percentage such as 3%")
    _tell(remeasure(artifact, profile, home.resolve(), wanted, agent), json)


def _tell(found: Remeasured | Swept, json: bool) -> None:
    if json:
        print_json(found.to_dict())
    else:
        for line in found.lines():
            print_text(line)
    if (problem := found.problem()) is not None:
        raise problem
