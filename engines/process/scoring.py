"""Scoring windows of text inside an engine child: NLL per window, and distance to the reference's logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from paretune.engines.batching import even_batches

if TYPE_CHECKING:
    from paretune.engines.decoder import EngineDecoder

LOGIT_BYTES_PER_BATCH = 64 * 2**20


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Over the last axis, in float32."""
    shifted: npt.NDArray[np.float32] = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def score_windows(decoder: EngineDecoder, request: dict[str, Any]) -> dict[str, Any]:
    """Score the rows of `request["ids"]` (npy [n, length]) with `request["targets"]` (npy [n]) valid targets each.

    Writes npy files: `nll` [n] summed nats per window; with `reference` also `kl` [m] and `agree` [m] summed over the
    targets of the first m windows whose reference log-probabilities are in that file; with `save_reference` writes them.
    With `start` and `stop` only those rows are scored and the rest of the files stays as an earlier request left it; with `one_by_one`
    no two windows share a run. Padding is not run, but for what levels windows of like length.
    """
    ids, targets = np.load(request["ids"], allow_pickle=False), np.load(request["targets"], allow_pickle=False)
    reference = np.load(request["reference"], mmap_mode="r", allow_pickle=False) if request.get("reference") else None
    m = int(request.get("reference_windows", 0))
    first, last = int(request.get("start", 0)), int(request.get("stop", len(ids)))
    saved = None
    if request.get("save_reference"):
        saved = np.lib.format.open_memmap(
            request["save_reference"], "w+" if first == 0 else "r+", np.float32, (m, ids.shape[1] - 1, decoder.vocab)
        )
    nll, kl, agree = (_begun(request.get(name), n, first) for name, n in (("nll", len(ids)), ("kl", m), ("agree", m)))
    tokens = 1 if request.get("one_by_one") else LOGIT_BYTES_PER_BATCH // (4 * decoder.vocab)
    for chosen, length in even_batches(targets[first:last], tokens):
        batch = np.ascontiguousarray(ids[first + chosen, :length])
        log_probs = log_softmax(decoder.logits(batch)[:, :-1])
        for row, i in enumerate((first + chosen).tolist()):
            n = int(targets[i])
            mine = log_probs[row, :n]
            nll[i] = -mine[np.arange(n), batch[row, 1 : n + 1]].sum(dtype=np.float64)
            if i >= m:
                continue
            if saved is not None:
                saved[i, :n] = mine
            if reference is not None:
                theirs = reference[i, :n]
                kl[i] = (np.exp(theirs) * (theirs - mine)).sum(dtype=np.float64)
                agree[i] = (theirs.argmax(-1) == mine.argmax(-1)).sum()
    np.save(request["nll"], nll)
    if reference is not None:
        np.save(request["kl"], kl)
        np.save(request["agree"], agree)
    return {"windows": last - first}


def _begun(file: str | None, n: int, first: int) -> npt.NDArray[np.float64]:
    """`n` sums: those of an earlier request, zeros at the first one."""
    return np.zeros(n) if first == 0 or file is None or not Path(file).exists() else np.load(file, allow_pickle=False)
