"""Token ids of a corpus, encoded once and kept as memory-mapped files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paretune.common.errors import UsageError
from paretune.common.files import read_kept, warn_damaged, write_atomically
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.corpus import SPLITS, Corpus, Document, Split

MIN_TOKENS: dict[Split, int] = {"train": 20_000, "calibration": 512, "search": 512, "report": 512}
BATCH_DOCUMENTS = 64
# Raised when the ids that a text is encoded to change.
ENCODING = 2
# Share of tokens that are no padding in windows that statistics are taken over.
LEAST_FILL = 0.6
# Characters of a document that are looked at when it is only asked whether there is enough.
PIECE = 100_000


@dataclass(frozen=True)
class TokenSplit:
    """One split as token ids. `offsets` has one entry more than there are documents; `sizes` are UTF-8 bytes per document."""

    ids: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def windows(self, length: int, most_tokens: int | None = None) -> Windows:
        """Consecutive windows of `length` tokens inside each document, the last one of a document padded to the longest of all.

        `most_tokens` thins the windows evenly. A target is every token but the first of its window; single tokens are dropped.
        """
        spans = [
            (d, s, min(s + length, int(b)))
            for d, (a, b) in enumerate(zip(self.offsets, self.offsets[1:], strict=False))
            for s in range(int(a), int(b), length)
            if min(s + length, int(b)) - s >= 2
        ]
        total, width = sum(e - s - 1 for _, s, e in spans), max((e - s for _, s, e in spans), default=length)
        if most_tokens is not None and total > most_tokens:
            keep = max(1, round(len(spans) * most_tokens / total))
            spans = [spans[i] for i in np.unique(np.linspace(0, len(spans) - 1, keep).round().astype(int))]
        ids = np.zeros((len(spans), width), np.int64)
        targets = np.zeros(len(spans), np.int64)
        for row, (_, start, end) in enumerate(spans):
            ids[row, : end - start] = self.ids[start:end]
            targets[row] = end - start - 1
        return Windows(ids, targets, np.array([d for d, _, _ in spans], np.int64), self.bytes_per_token())

    def calibration(self, length: int, most_tokens: int) -> npt.NDArray[np.int64]:
        """Token ids [n, length or less] of about `most_tokens` tokens to take statistics over, with little padding or none.

        They are `windows`, but where less than LEAST_FILL of those is text, documents are joined as in training: statistics
        over padding are none of the text.
        """
        windows = self.windows(length, most_tokens)
        filled = windows.total_targets + len(windows.ids)
        if filled >= LEAST_FILL * windows.ids.size:
            return windows.ids
        rows = max(1, min(most_tokens, len(self.ids)) // length)
        return self.ids[: rows * length].astype(np.int64).reshape(rows, -1)

    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the text per token (the end tokens counted)."""
        return float(self.sizes.sum()) / max(1, len(self.ids))


@dataclass(frozen=True)
class Windows:
    """Rows of token ids [n, length] to score; row i has `targets[i]` targets and belongs to document `cluster[i]`."""

    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    cluster: npt.NDArray[np.int64]
    bytes_per_token: float

    @property
    def total_targets(self) -> int:
        """Number of targets in all windows together."""
        return int(self.targets.sum())


def token_splits(teacher: Teacher, corpus: Corpus, cache: Path) -> dict[Split, TokenSplit]:
    """All four splits encoded with the teacher's tokenizer, from `cache` when they were encoded before.

    Raises UsageError if a split is too small to train on or to judge with.
    """
    folder = cache / "tokens" / _key(teacher, corpus)
    found = {split: _one(teacher, corpus.splits[split], folder, split) for split in SPLITS}
    for split in MIN_TOKENS:
        _check_size(found[split], split, corpus)
    return found


def token_split(teacher: Teacher, corpus: Corpus, split: Split, cache: Path) -> TokenSplit:
    """One of the splits that `token_splits` gives, without encoding the others. Raises UsageError if it is too small."""
    folder = cache / "tokens" / _key(teacher, corpus)
    found = _one(teacher, corpus.splits[split], folder, split)
    _check_size(found, split, corpus)
    return found


def _key(teacher: Teacher, corpus: Corpus) -> str:
    """Names what decides the ids; the end token may come from a file that the teacher's digest does not cover."""
    return f"{teacher.digest}-{corpus.fingerprint()}-{teacher.end_token}-{ENCODING}"


def require_enough_tokens(teacher: Teacher, corpus: Corpus) -> None:
    """Raises UsageError if a split is too small, as `token_splits` would, but encodes no more than it takes to know."""
    for split, least in MIN_TOKENS.items():
        documents, found = corpus.splits[split], 0
        for start in range(0, len(documents), BATCH_DOCUMENTS):
            pieces = [d.text[:PIECE] for d in documents[start : start + BATCH_DOCUMENTS]]
            encoded = teacher.tokenizer.encode_batch(pieces, add_special_tokens=False)
            found += sum(len(encoding.ids) + 1 for encoding in encoded)
            if found >= least:
                break
        else:
            if all(len(d.text) <= PIECE for d in documents):
                raise _too_small(split, corpus, found)
            _check_size(_split_of(teacher, documents), split, corpus)


def _split_of(teacher: Teacher, documents: tuple[Document, ...]) -> TokenSplit:
    ids, offsets = _encode(teacher, documents)
    sizes = [len(d.text.encode("utf8", "replace")) for d in documents]
    return TokenSplit(ids, np.array(offsets, np.int64), np.array(sizes, np.int64), tuple(d.name for d in documents))


def _check_size(found: TokenSplit, split: Split, corpus: Corpus) -> None:
    if len(found.ids) < MIN_TOKENS[split]:
        raise _too_small(split, corpus, len(found.ids))
    if not (np.diff(found.offsets) > 1).any():
        raise UsageError(
            f"a document must have a token to predict, but none of the {split} split of {corpus.source} has two tokens",
            "give longer documents with --data",
        )


def _too_small(split: Split, corpus: Corpus, tokens: int) -> UsageError:
    read = f" ({'; '.join(corpus.read)})" if corpus.read else ""
    return UsageError(
        f"the {split} split must have at least {MIN_TOKENS[split]:,} tokens, but {corpus.source} gives {tokens:,}{read}",
        "give more text with --data",
    )


def _one(teacher: Teacher, documents: tuple[Document, ...], folder: Path, split: str) -> TokenSplit:
    index, data = folder / f"{split}.json", folder / f"{split}.u32"
    meta = _kept_index(index, data)
    if meta is None:
        made = _split_of(teacher, documents)
        write_atomically(data, made.ids.tobytes())
        meta = {"offsets": made.offsets.tolist(), "sizes": made.sizes.tolist(), "names": list(made.names)}
        write_atomically(index, json.dumps(meta).encode())
    ids = np.memmap(data, np.uint32, "r") if data.stat().st_size else np.zeros(0, np.uint32)
    return TokenSplit(ids, np.array(meta["offsets"], np.int64), np.array(meta["sizes"], np.int64), tuple(meta["names"]))


def _kept_index(index: Path, data: Path) -> dict[str, Any] | None:
    """What is known of a kept split; None if it is not there, damaged, or does not fit its token file."""
    found: dict[str, Any] | None = read_kept(index)
    try:
        if found is None:
            return None
        if data.stat().st_size != 4 * found["offsets"][-1] or not len(found["sizes"]) == len(found["names"]):
            raise ValueError(f"{data.name} has another length")
        return found
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        warn_damaged(index, error)
        return None


def _encode(teacher: Teacher, documents: tuple[Document, ...]) -> tuple[npt.NDArray[np.uint32], list[int]]:
    pieces: list[npt.NDArray[np.uint32]] = []
    offsets, end = [0], teacher.special.stop[:1]
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        texts = [d.text for d in documents[start : start + BATCH_DOCUMENTS]]
        for encoding in teacher.tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, *end], np.uint32))
            offsets.append(offsets[-1] + len(pieces[-1]))
    return (np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)), offsets
