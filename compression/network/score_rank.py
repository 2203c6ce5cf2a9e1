"""One rank of `paretune score`: `python -m paretune.compression.network.score_rank FOLDER RANK RANKS`.

FOLDER holds `job.json` (the teacher, checked by the launcher; the batches), `ids.npy` [n, length] and `targets.npy` [n]; the first
rank writes `nll.npy`, the summed nats of every window's first `targets` tokens.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune.compression.network.ranks import as_rank
from paretune.compression.network.tensor_parallel import Ranks, ShardedNetwork
from paretune.hardware_profiles.lock import MachineLock
from paretune.spaces.candidate import Shape
from paretune.teachers.checkpoint.shards import read_shard
from paretune.teachers.checkpoint.teacher import Teacher

PROGRAM = ("-m", "paretune.compression.network.score_rank")
JOB, IDS, TARGETS, NLL = "job.json", "ids.npy", "targets.npy", "nll.npy"


def write_job(
    folder: Path,
    teacher: Teacher,
    ids: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    batches: Iterable[tuple[np.ndarray[Any, Any], int]],
) -> None:
    """What the ranks read; `batches` are rows of `ids` that are scored together, and their length."""
    job = {
        "batches": [(rows.tolist(), length) for rows, length in batches],
        "name": teacher.name,
        "folder": str(teacher.folder),
        "config": teacher.config,
        "shape": asdict(teacher.shape),
        "digest": teacher.digest,
    }
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    np.save(folder / IDS, ids)
    np.save(folder / TARGETS, targets)


def score(folder: Path, rank: int, degree: int) -> None:
    """Score all windows together with the other ranks."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    teacher = Teacher(job["name"], Path(job["folder"]), job["config"], Shape(**job["shape"]), job["digest"])
    ids, targets = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (IDS, TARGETS))
    torch.set_num_interop_threads(1)
    sharded = ShardedNetwork(
        teacher.config, teacher.shape, read_shard(teacher, rank, degree), Ranks(folder, rank, degree)
    )
    lock = MachineLock() if rank == 0 else None  # the others follow it: two holders could wait for each other
    nll = np.zeros(len(ids))
    for rows, length in job["batches"]:
        with lock.shared() if lock is not None else contextlib.nullcontext():
            batch = torch.from_numpy(np.array(ids[rows, :length]))
            losses = sharded.token_losses(batch).double().numpy()
        for i, row in zip(rows, losses, strict=True):
            nll[i] = row[: targets[i]].sum()
    if rank == 0:
        np.save(folder / NLL, nll)


if __name__ == "__main__":
    as_rank(score)
