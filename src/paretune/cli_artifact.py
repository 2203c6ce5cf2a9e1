"""The commands that work on an artifact: let it write, measure it again."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from paretune.cli_options import HOME, Home, Json
from paretune.console import print_json, print_text, talk


def generate(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the engine.")] = 1,
    json: Json = False,
) -> None:
    """Stream text from an artifact through onnxruntime-genai and say how fast."""
    from paretune.engines.generate import require_text, stream

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
                talk.print(
                    f"{piece.tokens} tokens, {piece.tokens_per_second:.0f} tokens/s, first token after {piece.ttft_ms:.1f} ms, {threads} thread(s)"
                )


def measure(
    artifact: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    profile: Annotated[str, typer.Option(help="Target machine: a name or a YAML file.")] = "local-cpu",
    agent: Annotated[str | None, typer.Option(help="URL of a `paretune agent` that measures it on its machine.")] = None,
    home: Home = HOME,
    json: Json = False,
) -> None:
    """Measure an artifact again by the lane and say whether it agrees with its study."""
    from paretune.search.remeasure import remeasure

    found = remeasure(artifact, profile, home.resolve(), agent)
    if json:
        print_json(found.to_dict())
    else:
        for line in found.lines():
            print_text(line)
