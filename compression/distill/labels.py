"""The teacher's soft labels for a batch: computed anew, or cut to the likeliest tokens and kept on disk.

All recoveries of a study read the same text in the same order, so what the teacher says about it can be kept: per token the
k likeliest tokens with their log-probabilities (float16) and one bucket for all others, a zstd file per batch. What cutting
without the bucket does to the student is shown by Anshumann et al. 2025 (sparse logit sampling,
arXiv 2503.16870). A kept label and a fresh one are the same bit for bit, so a hit changes nothing but the time.

Suggested k: 64 or more. Saves a fifth of a recovery's time on the embedded teacher, and costs some thousandths of a nat
(docs/log.md). It hurts where the teacher is unsure or the temperature high: then the bucket holds much of the probability.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import zstandard

from paretune.compression.distill.loss import SoftLabels, TopLabels

MOST_BYTES = 512 * 2**20
HEADER = struct.Struct("<8sIIB32s")  # magic, rows, k, bytes per token id, digest of the batch
MAGIC = b"ptlabel1"
ZSTD_LEVEL = 1


class LabelCache:
    """Labels of `k` tokens at `temperature` under `folder`, one subfolder per `content` (teacher, text, order of batches).

    Holds at most `most_bytes`: other contents make room first, the oldest before the rest; what then does not fit is not kept.
    A file that cannot be read or written counts as a miss.
    """

    def __init__(
        self, folder: Path, content: Sequence[str], k: int, temperature: float = 1.0, most_bytes: int = MOST_BYTES
    ) -> None:
        if k < 1:
            raise ValueError(f"at least one token per position must be kept, but got k={k}")
        parts = "\0".join([*content, str(k), repr(float(temperature)), MAGIC.decode()])
        self.root, self.folder = folder, folder / hashlib.sha256(parts.encode()).hexdigest()[:16]
        self.k, self.temperature, self.most_bytes = k, temperature, most_bytes
        self.hits = self.misses = 0
        self._used: int | None = None

    def labels(self, ids: torch.Tensor, logits: Callable[[], torch.Tensor]) -> TopLabels:
        """The labels of a batch of token ids; `logits()` is called on a miss only."""
        digest = hashlib.sha256(ids.numpy().tobytes() + str(tuple(ids.shape)).encode()).digest()
        file = self.folder / f"{digest.hex()[:24]}.zst"
        with contextlib.suppress(OSError, ValueError, zstandard.ZstdError):
            found = _unpack(file.read_bytes(), digest, self.temperature)
            self.hits += 1
            return found
        self.misses += 1
        data = _pack(TopLabels.of(logits(), self.k, self.temperature), digest)
        with contextlib.suppress(OSError):  # a full disk costs time, no candidate
            self._write(file, data)
        return _unpack(data, digest, self.temperature)

    def _write(self, file: Path, data: bytes) -> None:
        if self._used is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room()
        used = self._used or 0
        if used + len(data) > self.most_bytes:
            return
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        self._used = used + len(data)

    def _make_room(self) -> None:
        """Drop the other contents, oldest first, until half of the room is free for this one."""
        own = _size(self.folder)
        others = sorted((p for p in self.root.iterdir() if p != self.folder), key=lambda p: p.stat().st_mtime)
        sizes = [_size(p) for p in others]
        while others and own + sum(sizes) > self.most_bytes / 2:
            shutil.rmtree(others.pop(0), ignore_errors=True)
            sizes.pop(0)
        self._used = own + sum(sizes)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.zst"))


def _pack(labels: TopLabels, digest: bytes) -> bytes:
    """Log-probabilities as float16, their two bytes apart (they compress better), ids in 2 or 4 bytes, the rest as float32."""
    tokens, (rows, k) = labels.tokens.numpy(), labels.tokens.shape
    width = 2 if int(tokens.max()) < 2**16 else 4
    top = labels.log_top.to(torch.float16).numpy().view(np.uint8).reshape(rows * k, 2)
    body = b"".join(
        (
            tokens.astype(f"<u{width}").tobytes(),
            np.ascontiguousarray(top.T).tobytes(),
            labels.log_rest.numpy().astype("<f4").tobytes(),
        )
    )
    whole = HEADER.pack(MAGIC, rows, k, width, digest) + body
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(whole)


def _unpack(data: bytes, digest: bytes, temperature: float) -> TopLabels:
    """Inverse of `_pack`. Raises ValueError or ZstdError for anything but labels of this batch."""
    whole = zstandard.ZstdDecompressor().decompress(data)
    if len(whole) < HEADER.size:
        raise ValueError("a kept label must have a header, but it is too short")
    magic, rows, k, width, name = HEADER.unpack_from(whole)
    if (magic, name) != (MAGIC, digest) or len(whole) != HEADER.size + rows * (k * (width + 2) + 4):
        raise ValueError("a kept label must be of this batch and whole, but it is not")
    at, n = HEADER.size, rows * k
    tokens = np.frombuffer(whole, f"<u{width}", n, at).reshape(rows, k)
    split = np.frombuffer(whole, np.uint8, 2 * n, at + n * width).reshape(2, n)
    top = np.ascontiguousarray(split.T).view(np.float16).reshape(rows, k)
    rest = np.frombuffer(whole, "<f4", rows, at + n * (width + 2))
    return TopLabels(
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(top.astype(np.float32)),
        torch.from_numpy(rest.astype(np.float32)),
        temperature,
    )


def soft_labels(
    logits: Callable[[], torch.Tensor], ids: torch.Tensor, temperature: float, cache: LabelCache | None
) -> SoftLabels | TopLabels:
    """What the teacher says about a batch, from the cache if there is one; `logits()` runs the teacher."""
    return SoftLabels(logits(), temperature) if cache is None else cache.labels(ids, logits)
