"""Whether onnxruntime-genai reads a tokenizer as transformers does, tried in a child process: its parser may take us down."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLES = ("The model reads 12 lines.", "def f(x):\n    return x + 1\n", "Grüße, 東京")
TIMEOUT_S = 60.0
CONFIG = {"model": {"type": "llama", "context_length": 64, "decoder": {"filename": "model.onnx"}}, "search": {}}


def tokenizer_problem(folder: Path) -> str | None:
    """Why a program on onnxruntime-genai cannot use the tokenizer of this teacher's folder; None if it can.

    Raises UsageError if the folder's files are damaged.
    """
    from paretune.teachers.tokenizer.tokenizer_files import plain_tokenizer_config, plain_tokenizer_json

    return _tried(json.dumps(plain_tokenizer_json(folder)), json.dumps(plain_tokenizer_config(folder)))


@functools.lru_cache(maxsize=8)
def _tried(tokenizer: str, config: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="paretune-") as name:
        folder = Path(name)
        for file, content in (
            ("tokenizer", tokenizer),
            ("tokenizer_config", config),
            ("genai_config", json.dumps(CONFIG)),
        ):
            (folder / f"{file}.json").write_text(content, encoding="utf8")
        command = [sys.executable, "-m", "paretune.engines.onnxruntime.genai_tokenizer", name]
        try:
            done = subprocess.run(command, capture_output=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"it was not loaded within {TIMEOUT_S:.0f} s"
    lines = done.stdout.decode("utf8", "replace").splitlines()
    if done.returncode < 0:
        return f"loading it ended with signal {-done.returncode}"
    if done.returncode or not lines:
        return None if not lines else lines[-1]
    return _difference(json.loads(lines[-1]), tokenizer)


def _difference(found: list[list[int]], tokenizer: str) -> str | None:
    from tokenizers import Tokenizer

    expected = Tokenizer.from_str(tokenizer)
    for text, ids in zip(SAMPLES, found, strict=True):
        wanted = expected.encode(text).ids
        if ids != wanted:
            return f"it reads {text!r} as {ids[:8]} where transformers reads {wanted[:8]}"
    return None


def main(folder: str) -> int:
    """Print the ids of SAMPLES as JSON, or why there are none. Where onnxruntime-genai is not installed, print nothing."""
    try:
        import onnxruntime_genai as og
    except ImportError:
        return 0
    try:
        tokenizer = og.Tokenizer(og.Config(folder))
        tokenizer.update_options(add_special_tokens="true")
        print(json.dumps([[int(i) for i in tokenizer.encode(text)] for text in SAMPLES]))
    except Exception as error:  # whatever its parser raises
        print(" ".join(str(error).split())[:200] or type(error).__name__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
