"""A teacher's NLL on text, computed by one process or, where it is too large for one, by several that share its weights."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from paretune.common.errors import EnvironmentProblem
from paretune.common.memory import available_memory
from paretune.compression.network.ranks import run_ranks
from paretune.compression.network.score_rank import NLL, PROGRAM, write_job
from paretune.engines.batching import even_batches
from paretune.hardware_profiles.detect import fingerprint
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.batching import WINDOW, batch_within_memory
from paretune.objectives.quality.quality import Scores, quality_measurements, sum_by_document
from paretune.teachers.checkpoint.shards import check_degree
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.tokens import TokenSplit

BATCH = 8
# Libraries, activations and logits of one process, measured: 0.38 to 0.44 GB.
PROCESS_BYTES = 450_000_000
SHOWN = ("nll", "perplexity", "bits_per_byte")


def score_teacher(
    teacher: Teacher, tokens: TokenSplit, ranks: int = 1, timeout_s: float = 3600.0, most_tokens: int | None = None
) -> tuple[Scores, dict[str, Measurement]]:
    """NLL per document in windows of 256 tokens, and nll, perplexity and bits_per_byte with intervals over documents.

    `ranks` processes of this machine divide the weights among them; `most_tokens` thins the text evenly. Raises UsageError where
    the shape cannot be divided so, EnvironmentProblem where memory is short, a rank fails or `timeout_s` pass.
    """
    check_degree(teacher.shape, ranks)
    _check_memory(teacher, ranks)
    windows = tokens.windows(min(WINDOW, teacher.context), most_tokens)
    batch = batch_within_memory(BATCH, windows.ids.shape[1], teacher.shape)
    with tempfile.TemporaryDirectory(prefix="paretune-ranks-") as name:
        folder = Path(name)
        write_job(
            folder, teacher, windows.ids, windows.targets, even_batches(windows.targets, batch * windows.ids.shape[1])
        )
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        run_ranks(PROGRAM, ranks, folder, timeout_s, threads)
        nll = np.load(folder / NLL, allow_pickle=False)
    documents = len(tokens.names)
    targets = sum_by_document(windows.targets, windows.cluster, documents)
    scores = Scores(
        tokens.names, sum_by_document(nll, windows.cluster, documents), tuple(round(count) for count in targets)
    )
    found = quality_measurements(scores, scores, windows.bytes_per_token, fingerprint())
    return scores, {name: found[name] for name in SHOWN}


def _check_memory(teacher: Teacher, ranks: int) -> None:
    """All ranks are on this machine: together they hold all weights, and each what a process takes."""
    needed, free = 4 * teacher.parameters + ranks * PROCESS_BYTES, available_memory()
    if needed > free:
        raise EnvironmentProblem(
            f"{teacher.name} in float32 takes {needed / 1e9:.1f} GB in {ranks} processes, but {free / 1e9:.1f} GB of memory are free",
            "use a machine with more memory, or fewer processes",
        )
