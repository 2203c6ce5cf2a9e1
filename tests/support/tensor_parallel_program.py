"""What the ranks of test_tensor_parallel.py run: all cases in one launch, because starting torch is what takes the time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune.compression.network.ranks import as_rank
from paretune.compression.network.student import EMBEDDING
from paretune.compression.network.tensor_parallel import SUMMED, Ranks, ShardedNetwork
from paretune.teachers.checkpoint.shards import read_shard
from paretune.teachers.checkpoint.teacher import load_teacher


class Forgetful(ShardedNetwork):
    """A control: the output products are not summed."""

    def _sum_output(self, _module, _inputs, output):
        return output


class HalfForgetful(ShardedNetwork):
    """A control: only the attention's output products are summed."""

    def _sum_output(self, module, inputs, output):
        attention = [self.network.part(layer, SUMMED[0]) for layer in self.network.layers]
        return super()._sum_output(module, inputs, output) if any(module is m for m in attention) else output


def own_addresses() -> list[str]:
    """Local addresses (hexadecimal) of this process's TCP sockets."""
    sockets = {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()[1:]
    ]
    return [row[1].split(":")[0] for row in rows if f"socket:[{row[9]}]" in sockets]


def work(folder: Path, rank: int, degree: int) -> None:
    torch.set_num_threads(1)
    ranks = Ranks(folder, rank, degree)
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    found: dict[str, Any] = {}
    for name, path in json.loads((folder / "cases.json").read_text()).items():
        teacher = load_teacher(path)
        shard = read_shard(teacher, rank, degree)
        other = read_shard(teacher, 1 - rank, degree)
        layer = "model.layers.0."
        swapped = {"mlp.down_proj.weight", "self_attn.k_proj.weight", "mlp.up_proj.weight"}
        variants = {
            "right": (ShardedNetwork, shard),
            "nothing summed": (Forgetful, shard),
            "FFN not summed": (HalfForgetful, shard),
            **{f"{part} swapped": (ShardedNetwork, {**shard, layer + part: other[layer + part]}) for part in swapped},
        }
        if teacher.shape.vocab % 2 == 0:
            variants["table swapped"] = (ShardedNetwork, {**shard, EMBEDDING: other[EMBEDDING]})
        for variant, (kind, weights) in variants.items():
            sharded = kind(teacher.config, teacher.shape, weights, ranks)
            found[f"{name}/{variant}/losses"] = sharded.token_losses(ids).numpy()
            if variant == "right":
                found[f"{name}/{variant}/logits"] = sharded.logits(ids).numpy()
        found[f"{name}/numbers"] = np.array(sum(value.numel() for value in shard.values()))
    found["addresses"] = np.array(own_addresses())
    np.savez(folder / f"found{rank}.npz", **found)
    stray = [name for name in sys.modules if name.startswith(("ray", "mlflow"))]
    assert not stray, stray


if __name__ == "__main__":
    as_rank(work)
