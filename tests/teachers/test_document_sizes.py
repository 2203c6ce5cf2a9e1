"""Documents of odd sizes: few, huge, tiny, very unequal. Every part gets enough, and short ones cost no padding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretune.common.errors import UsageError
from paretune.compression.network.student import Network
from paretune.engines.batching import LEAST_FILL, even_batches
from paretune.engines.process.scoring import score_windows
from paretune.objectives.quality.score import score_teacher
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.corpus import SPLITS, Corpus, Document, user_corpus
from paretune.teachers.text.tokens import MIN_TOKENS, TokenSplit, require_enough_tokens, token_splits


def write_records(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def distinct(start: int, count: int, generated_document: Callable[..., str], words: int) -> list[str]:
    return [generated_document(start + i, words) for i in range(count)]


def fits(corpus: Corpus, teacher: Teacher, cache: Path) -> dict[str, int]:
    require_enough_tokens(teacher, corpus)
    found = token_splits(teacher, corpus, cache)
    assert all(len(found[split].ids) >= MIN_TOKENS[split] for split in SPLITS)
    assert all(found[split].windows(256).total_targets for split in SPLITS)
    return {split: len(corpus.splits[split]) for split in SPLITS}


@pytest.mark.parametrize("seed", range(6), ids=lambda seed: f"the long one in another part {seed}")
def test_nine_small_records_and_a_huge_one_are_cut(
    tmp_path: Path, tiny_teacher: Teacher, generated_document: Callable[..., str], seed: int
) -> None:
    small = distinct(100 * seed, 9, generated_document, 20)
    path = write_records(tmp_path / "x.jsonl", [*small, generated_document(7777 + seed, 60_000)])
    corpus = user_corpus(path, "text")
    assert min(fits(corpus, tiny_teacher, tmp_path / "cache").values()) >= 2
    assert "10 documents are too few or too unequal to be divided whole" in " ".join(corpus.read)
    whole = sum(len(d.text) for split in SPLITS for d in corpus.splits[split])
    assert whole == sum(map(len, small)) + len(generated_document(7777 + seed, 60_000))


@pytest.mark.parametrize("sizes", [[60_000], [30_000, 30_000], [9_000] * 7, [2, 3, 4, 60_000], [60_000] + [10] * 500])
def test_few_or_unequal_documents_give_enough_to_every_part(
    tmp_path: Path, tiny_teacher: Teacher, generated_document: Callable[..., str], sizes: list[int]
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i, size in enumerate(sizes):
        (folder / f"{i}.txt").write_text(generated_document(i, max(10, size)))
    assert min(fits(user_corpus(folder), tiny_teacher, tmp_path / "cache").values()) >= 2


def test_documents_of_usual_sizes_stay_whole(tiny_text: Path) -> None:
    corpus = user_corpus(tiny_text)
    assert sum(len(corpus.splits[split]) for split in SPLITS) == 60
    assert not any("unequal" in line for line in corpus.read)


def test_many_documents_none_of_them_long_stay_whole(tmp_path: Path, tiny_teacher: Teacher) -> None:
    texts = [f"line {i} of very many" for i in range(30_000)]
    corpus = user_corpus(write_records(tmp_path / "x.jsonl", [*texts, *[""] * 5_000, *texts[:100]]), "text")
    assert corpus.read[-1] == "30,000 documents, 5,000 empty left out, 100 repeated left out"
    assert fits(corpus, tiny_teacher, tmp_path / "cache")["report"] == 1800


def test_too_little_text_is_refused_before_work_with_what_was_read(tmp_path: Path, tiny_teacher: Teacher) -> None:
    texts = tuple(Document(f"a:{i}", f"word {i}") for i in range(20))
    whole = Corpus("x.jsonl", dict.fromkeys(SPLITS, texts), ("20 documents, 3 null left out",))
    with pytest.raises(UsageError) as caught:
        require_enough_tokens(tiny_teacher, whole)
    assert "the train split must have at least 20,000 tokens, but x.jsonl gives " in caught.value.problem
    assert "(20 documents, 3 null left out)" in caught.value.problem
    with pytest.raises(UsageError) as later:
        token_splits(tiny_teacher, whole, tmp_path)
    assert later.value.problem == caught.value.problem


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 2000), st.booleans())
def test_every_window_is_in_one_batch_with_little_padding(targets: list[int], most: int, exact: bool) -> None:
    lengths = np.array(targets) + 1
    seen: list[int] = []
    for chosen, longest in even_batches(np.array(targets), most, exact):
        assert longest == lengths[chosen].max() and len(chosen) >= 1
        assert len(chosen) == 1 or len(chosen) * longest <= most
        assert (lengths[chosen] >= (longest if exact else LEAST_FILL * longest)).all()
        seen += chosen.tolist()
    assert sorted(seen) == list(range(len(targets)))


def one_line_tokens(teacher: Teacher, tmp_path: Path, count: int = 60) -> TokenSplit:
    lines = [" ".join(["water", "stone", "light"][: 1 + i % 3] * (1 + i % 5)) + f" {i}" for i in range(count)]
    part = tuple(Document(f"x:{i:04}", line) for i, line in enumerate(lines))
    long = (*part, Document("y", "the long one " * 200))
    from paretune.teachers.text.tokens import _split_of

    return _split_of(teacher, long)


def unpadded(teacher: Teacher, tokens: TokenSplit) -> list[float]:
    """The oracle: every window alone, nothing behind it."""
    network, weights = Network(teacher.config, teacher.shape, teacher.shape.layers), teacher.weights()
    found = [0.0] * len(tokens.names)
    with torch.no_grad():
        for d, (a, b) in enumerate(zip(tokens.offsets, tokens.offsets[1:], strict=False)):
            for s in range(int(a), int(b), 256):
                ids = torch.from_numpy(tokens.ids[s : min(s + 256, int(b))].astype(np.int64))[None]
                if ids.shape[1] > 1:
                    found[d] += float(network.token_losses(weights, ids).double().sum())
    return found


def test_torch_gives_every_document_the_loss_that_it_has_alone(tmp_path: Path, tiny_teacher: Teacher) -> None:
    tokens = one_line_tokens(tiny_teacher, tmp_path)
    scores, _ = score_teacher(tiny_teacher, tokens)
    wanted = unpadded(tiny_teacher, tokens)
    per_token = [n / t for n, t in zip(scores.nll, scores.targets, strict=True)]
    assert per_token == pytest.approx([n / t for n, t in zip(wanted, scores.targets, strict=True)], abs=1e-5)


class TorchDecoder:
    """An engine's decoder from torch; counts the tokens that it is given."""

    def __init__(self, teacher: Teacher) -> None:
        self.network = Network(teacher.config, teacher.shape, teacher.shape.layers)
        self.weights, self.vocab, self.tokens = teacher.weights(), teacher.shape.vocab, 0

    def logits(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.tokens += ids.size
        with torch.no_grad():
            found: np.ndarray[Any, Any] = self.network(self.weights, torch.from_numpy(ids)).numpy()
        return found


@pytest.mark.parametrize("alone", [False, True])
def test_the_engine_gives_every_document_the_loss_that_it_has_alone(
    tmp_path: Path, tiny_teacher: Teacher, alone: bool
) -> None:
    tokens = one_line_tokens(tiny_teacher, tmp_path)
    windows = tokens.windows(256)
    for name, array in (("ids", windows.ids), ("targets", windows.targets)):
        np.save(tmp_path / f"{name}.npy", array)
    request = {name: str(tmp_path / f"{name}.npy") for name in ("ids", "targets", "nll", "kl", "agree")}
    request |= {"reference_windows": 40, "one_by_one": alone}  # type: ignore[dict-item]
    decoder: Any = TorchDecoder(tiny_teacher)
    file = str(tmp_path / "reference.npy")
    for start, stop in ((0, 25), (25, len(windows.ids))):
        score_windows(decoder, {**request, "save_reference": file, "start": start, "stop": stop})
    sums = np.bincount(windows.cluster, np.load(request["nll"]), len(tokens.names))
    assert sums.tolist() == pytest.approx(unpadded(tiny_teacher, tokens), abs=1e-3)
    used = int((windows.targets + 1).sum())
    assert used <= decoder.tokens <= (1.0 if alone else 1.25) * used < 0.3 * windows.ids.size
    score_windows(decoder, {**request, "reference": file})
    assert np.abs(np.load(request["kl"])).max() < 1e-4
    assert np.load(request["agree"]).tolist() == windows.targets[:40].tolist()


def test_statistics_of_short_documents_see_no_padding(tmp_path: Path, tiny_teacher: Teacher) -> None:
    tokens = one_line_tokens(tiny_teacher, tmp_path, 300)
    assert (tokens.windows(256).ids == 0).mean() > 0.5  # 0 is the end token too
    packed = tokens.calibration(256, 2048)
    assert packed.shape == (8, 256)
    assert packed.ravel().tolist() == tokens.ids[:2048].tolist()


def test_statistics_of_long_documents_are_over_their_windows(tiny_tokens: dict[str, TokenSplit]) -> None:
    tokens = tiny_tokens["calibration"]
    assert np.array_equal(tokens.calibration(256, 4000), tokens.windows(256, 4000).ids)
