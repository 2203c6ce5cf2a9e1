"""Streaming text from an artifact through onnxruntime-genai."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from paretune.common.errors import EnvironmentProblem, UsageError


@dataclass(frozen=True)
class Pace:
    """How fast a text was made: `tokens` new ones; the rate counts the tokens after the first."""

    tokens: int
    tokens_per_second: float
    ttft_ms: float


def stream(
    artifact: Path, prompt: str, max_tokens: int, temperature: float, threads: int
) -> Generator[str | Pace, None, None]:
    """Pieces of text as they are made, then one Pace. The artifact's checksums are verified first.

    Raises UsageError for a damaged artifact, a prompt that is empty, no text, or longer than the model's context.
    """
    require_text(prompt)
    from tokenizers.decoders import DecodeStream

    from paretune.common.checksums import check_artifact
    from paretune.teachers.tokenizer.tokenizer_files import load_tokenizer

    if check_artifact(artifact).get("kind") == "module":
        raise UsageError(
            f"generate streams text, but {artifact} is a module of a plug-in", "run its onnx/model.onnx in ONNX Runtime"
        )
    try:
        import onnxruntime_genai as og
    except ImportError as error:
        raise EnvironmentProblem(
            f"onnxruntime-genai cannot be imported: {error}", "pip install onnxruntime-genai"
        ) from None
    # not og.Tokenizer: it adds no BOS by itself, and cannot read every kind
    tokenizer = load_tokenizer(artifact / "onnx")
    ids = tokenizer.encode(prompt).ids
    context = _context(artifact)
    if len(ids) == 0 or len(ids) >= context:
        raise UsageError(f"the prompt must have 1 to {context - 1} tokens, but has {len(ids)}", "give another --prompt")
    config = og.Config(str(artifact / "onnx"))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    # it takes tokens at the end of a prompt that equal the one for padding as padding
    config.overlay(f'{{"model": {{"pad_token_id": {0 if ids[-1] else 1}}}}}')
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    longest = min(context, len(ids) + max_tokens)
    parameters.set_search_options(
        max_length=longest,
        min_length=0,
        num_beams=1,  # a stream has one text
        do_sample=temperature > 0,
        temperature=max(temperature, 1e-3),
    )
    generator, decoder = og.Generator(model, parameters), DecodeStream(ids, skip_special_tokens=True)
    start = time.perf_counter()
    generator.append_tokens(ids)
    count, first, held = 0, 0.0, list[int]()
    while not generator.is_done():
        generator.generate_next_token()
        count += 1
        if count == 1:
            first = time.perf_counter() - start
        held.append(int(generator.get_next_tokens()[0]))
        piece = decoder.step(tokenizer, held[-1])
        if piece:
            held.clear()
            yield piece
    rest = time.perf_counter() - start - first
    if piece := tokenizer.decode(held, skip_special_tokens=True):
        yield piece  # a character whose last bytes were not made, as every other runtime shows it
    yield Pace(count, (count - 1) / rest if count > 1 and rest > 0 else 0.0, first * 1e3)


def require_text(prompt: str) -> None:
    """Raises UsageError for a prompt that is no text: the shell passes bytes that are not UTF-8 as lone surrogates."""
    try:
        prompt.encode("utf8")
    except UnicodeEncodeError as error:
        byte = ord(prompt[error.start]) & 0xFF
        raise UsageError(
            f"the prompt must be UTF-8 text, but character {error.start + 1} is the byte 0x{byte:02x}",
            "convert it, for example with iconv",
        ) from None


def _context(artifact: Path) -> int:
    import json

    return int(
        json.loads((artifact / "onnx" / "genai_config.json").read_text(encoding="utf8"))["model"]["context_length"]
    )
