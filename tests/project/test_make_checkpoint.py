"""The random checkpoints of benchmarks/make_checkpoint.py are teachers, and the same ones every time."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from paretune.compression.network.student import Network
from paretune.spaces import Shape
from paretune.teachers.checkpoint.teacher import load_teacher

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "make_checkpoint.py"
spec = importlib.util.spec_from_file_location("make_checkpoint", SCRIPT)
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

LLAMA = Shape(2, 64, 128, 9, 3, 16, 5000)
GPT2 = Shape(2, 64, 128, 4, 4, 16, 5000, True, "gpt2", 128, False)


@pytest.mark.parametrize("shape", [LLAMA, GPT2])
def test_a_random_checkpoint_is_a_teacher_and_the_same_every_time(shape: Shape, tmp_path: Path) -> None:
    folders = [script.make_checkpoint(tmp_path / name, shape, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, again, other = (load_teacher(str(folder)) for folder in folders)
    assert first.digest == again.digest != other.digest
    assert first.shape == shape
    ids = first.tokenizer.encode("def main(): return 1", add_special_tokens=False).ids
    assert ids and max(ids) < 4096
    with torch.no_grad():
        logits = Network(first.config, shape, 2)(first.weights(), torch.tensor([ids]))
    assert torch.isfinite(logits).all() and logits.shape[-1] == 5000


def test_the_named_shapes_have_the_sizes_of_their_models() -> None:
    sizes = {name: round(shape.parameters / 1e6) for name, shape in script.SHAPES.items()}
    assert sizes == {"smollm-135m": 135, "smollm-360m": 362, "gpt2-124m": 124}
