"""Make `learned.safetensors`: the two small models that have learned the suite's generated text.

    .venv/bin/python tests/data/make_learned.py

Training in fp32 amplifies the last bit of a sum a millionfold, so every processor trains other weights (losses a fifth apart), and what is
asserted of them holds on one and fails on the next. Weights that lie in a file are the same everywhere: fp16, so that the
file is small; the tests compute with these values in fp32. Run again when the tiny teacher, its tokenizer or the text changes.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from paretune.compression.distill.optimizer import Optimizers, decay
from paretune.compression.network.student import Network
from paretune.teachers.checkpoint.teacher import load_teacher
from paretune.teachers.text.batches import Batches
from paretune.teachers.text.corpus import user_corpus
from paretune.teachers.text.tokens import token_splits

HERE = Path(__file__).parent
Weights = dict[str, torch.Tensor]


def five_layers(conftest: Any, folder: Path, ids: np.ndarray) -> Weights:
    """Of test_mixed.py: five layers, untied of any outliers."""
    teacher = load_teacher(
        str(conftest._write_teacher(folder / "five", 3, num_hidden_layers=5, initializer_range=0.06))
    )
    weights = {n: torch.nn.Parameter(w.clone()) for n, w in teacher.weights().items()}
    network = Network(teacher.config, teacher.shape, 5)
    optimizer = torch.optim.AdamW(weights.values(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    source, steps = np.random.default_rng(0), 260
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20, (steps - step) / 80)
        starts = source.integers(0, len(ids) - 65, 16)
        batch = torch.from_numpy(np.stack([ids[s : s + 65] for s in starts]))
        loss = F.cross_entropy(network(weights, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return dict(weights)


def three_layers(conftest: Any, folder: Path, ids: np.ndarray) -> Weights:
    """Of test_blockwise.py: the tiny teacher's shape."""
    teacher = load_teacher(str(conftest._write_teacher(folder / "three")))
    weights = {n: torch.nn.Parameter(0.3 * w if w.ndim == 2 else w.clone()) for n, w in teacher.weights().items()}
    network = Network(teacher.config, teacher.shape, 3)
    optimizers, batches = Optimizers(weights, 0.02, 3e-3), Batches(torch.as_tensor(ids), 64, 8, 0)
    for step in range(250):
        batch = batches.at(step)
        logits = network(weights, batch)[:, :-1]
        torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
        optimizers.step(decay(step, step / 250))
    return dict(weights)


def main() -> None:
    spec = importlib.util.spec_from_file_location("conftest", HERE.parent / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = load_teacher(str(conftest._write_teacher(folder / "tiny")))
        tokens = token_splits(tiny, user_corpus(conftest._write_text(folder / "text")), folder / "cache")
        ids = np.asarray(tokens["train"].ids, np.int64)
        made = {"five": five_layers(conftest, folder, ids), "three": three_layers(conftest, folder, ids)}
    tensors = {
        f"{model}/{n}": w.detach().half().contiguous() for model, weights in made.items() for n, w in weights.items()
    }
    save_file(tensors, HERE / "learned.safetensors")


if __name__ == "__main__":
    main()
