"""Text, its split by document, and the windows that are scored, against slow loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.common.errors import UsageError
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.teachers.text.corpus import (
    SPLITS,
    Corpus,
    Document,
    is_held_out,
    library_corpus,
    library_modules,
    user_corpus,
)
from paretune.teachers.text.tokens import MIN_TOKENS, TokenSplit, token_splits


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf8")
    return path


def texts(corpus: Corpus) -> list[str]:
    return [document.text for split in SPLITS for document in corpus.splits[split]]


def test_the_splits_of_a_folder_are_disjoint_complete_and_deterministic(tiny_text: Path) -> None:
    corpus = user_corpus(tiny_text)
    names = [document.name for split in SPLITS for document in corpus.splits[split]]
    assert sorted(names) == sorted(p.name for p in tiny_text.iterdir())
    assert len(set(names)) == len(names)
    assert corpus == user_corpus(tiny_text)
    assert corpus.fingerprint() == user_corpus(tiny_text).fingerprint()
    sizes = {split: len(corpus.splits[split]) for split in SPLITS}
    assert sizes == {"train": 52, "calibration": 2, "search": 2, "report": 4}


def test_a_document_keeps_its_split_whatever_its_file_is_called(tmp_path: Path, tiny_text: Path) -> None:
    for i, path in enumerate(sorted(tiny_text.iterdir(), reverse=True)):
        (tmp_path / f"{i:03}.md").write_bytes(path.read_bytes())
    renamed, original = user_corpus(tmp_path), user_corpus(tiny_text)
    for split in SPLITS:
        assert {d.text for d in renamed.splits[split]} == {d.text for d in original.splits[split]}
    assert renamed.fingerprint() != original.fingerprint()


def test_repeated_and_empty_documents_count_once_and_never(tmp_path: Path, write_text: Callable[..., Path]) -> None:
    write_text(tmp_path, 16)
    (tmp_path / "copy.txt").write_bytes((tmp_path / "document003.txt").read_bytes())
    (tmp_path / "empty.txt").write_text(" \n")
    found = texts(user_corpus(tmp_path))
    assert len(found) == len(set(found)) == 16


def test_a_long_text_file_is_cut_into_blocks_without_loss(
    tmp_path: Path, generated_document: Callable[..., str]
) -> None:
    whole = "".join(generated_document(i) for i in range(20))
    (tmp_path / "book.txt").write_text(whole)
    corpus = user_corpus(tmp_path / "book.txt")
    blocks = sorted((int(d.name.split(":")[1]), d.text) for split in SPLITS for d in corpus.splits[split])
    assert "".join(text for _, text in blocks) == whole
    assert all(corpus.splits[split] for split in SPLITS)


def test_a_jsonl_file_gives_one_document_per_line(tmp_path: Path, generated_document: Callable[..., str]) -> None:
    records: list[dict[str, Any]] = [{"id": i, "text": generated_document(i, 600)} for i in range(15)]
    corpus = user_corpus(write_lines(tmp_path / "a.jsonl", records), "text")
    assert sorted(texts(corpus)) == sorted(r["text"] for r in records)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_line_separators_inside_a_json_string_do_not_end_the_line(
    tmp_path: Path, separator: str, generated_document: Callable[..., str]
) -> None:
    records = [{"text": generated_document(i, 600) + f"a{separator}b"} for i in range(15)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf8")
    assert sorted(texts(user_corpus(path, "text"))) == sorted(r["text"] for r in records)


def test_lone_surrogates_escaped_in_json_can_be_encoded(tmp_path: Path, generated_document: Callable[..., str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": generated_document(i, 600) + "\ud800"}) + "\n" for i in range(15)))
    for text in texts(user_corpus(path, "text")):
        text.encode("utf8")


def problem_of(path: Path, field: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        user_corpus(path, field)
    assert caught.value.remedy
    return caught.value.problem


def test_mistakes_in_jsonl_are_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": "fine"})
    assert "name of its text field" in problem_of(write_lines(path, [{"text": "x"}]))
    path.write_text(f'{good}\n\n{{"body": "x", "n": 1}}\n')
    assert "a.jsonl:3: the field 'text' must hold text; this line has body, n" in problem_of(path, "text")
    path.write_text(f"{good}\n[1]\n")
    assert "a.jsonl:2:" in problem_of(path, "text")
    path.write_text(f'{good}\n{{"text": 5}}\n')
    assert "a.jsonl:2:" in problem_of(path, "text")
    path.write_text(f'{good}\n{good}\n{{"text": "x",}}\n')
    assert f"{path}:3:" in problem_of(path, "text")
    assert "not valid JSON" in problem_of(path, "text")


@pytest.mark.parametrize("filler", [0, 30_000], ids=["first block", "beyond the read buffer"])
def test_text_that_is_not_utf8_is_named_by_line(tmp_path: Path, filler: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * filler + "one\nzwei ü\n".encode() + b"caf\xe9 latin-1\nlast\n")
    assert f"{tmp_path / 'a.txt'}:3: the text must be UTF-8" in problem_of(tmp_path / "a.txt")


def test_missing_empty_and_tiny_text_is_refused_with_the_numbers(
    tmp_path: Path, write_text: Callable[..., Path]
) -> None:
    assert "does not exist" in problem_of(tmp_path / "nowhere")
    assert "holds no text file" in problem_of(tmp_path)
    (tmp_path / "a.txt").write_text("short")
    assert "has 1 and 5" in problem_of(tmp_path)
    write_text(tmp_path / "few", 7, 500)
    assert "has 7 and" in problem_of(tmp_path / "few")


def test_a_split_too_small_to_judge_with_is_refused(
    tmp_path: Path, tiny_teacher: Teacher, write_text: Callable[..., Path]
) -> None:
    corpus = user_corpus(write_text(tmp_path / "text", 60, 500))
    cut = Corpus("cut", {**corpus.splits, "search": (Document("a", "too little"),)})
    with pytest.raises(UsageError, match="the search split must have at least 512 tokens"):
        token_splits(tiny_teacher, cut, tmp_path)
    assert MIN_TOKENS["search"] == 512


def test_the_library_splits_keep_unseen_modules_for_judging() -> None:
    corpus = library_corpus()
    names = {split: {d.name for d in corpus.splits[split]} for split in SPLITS}
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == len(library_modules())
    assert all(is_held_out(name) for name in names["search"] | names["report"])
    assert not any(is_held_out(name) for name in names["train"] | names["calibration"])
    assert all(names.values())


def test_fingerprints_tell_splits_and_names_apart() -> None:
    a, b = Document("a", "x"), Document("b", "y")
    base = {"train": (a,), "calibration": (), "search": (b,), "report": ()}
    moved = {"train": (a, b), "calibration": (), "search": (), "report": ()}
    renamed = {**base, "search": (Document("c", "y"),)}
    prints = {Corpus("s", splits).fingerprint() for splits in (base, moved, renamed)}  # type: ignore[arg-type]
    assert len(prints) == 3


def test_tokens_are_those_of_the_tokenizer_with_an_end_after_every_document(
    tiny_teacher: Teacher, tiny_text: Path, tiny_tokens: dict[str, TokenSplit]
) -> None:
    corpus = user_corpus(tiny_text)
    for split in SPLITS:
        found = tiny_tokens[split]
        assert found.names == tuple(d.name for d in corpus.splits[split])
        for i, document in enumerate(corpus.splits[split]):
            ids = found.ids[found.offsets[i] : found.offsets[i + 1]].tolist()
            assert ids == [*tiny_teacher.tokenizer.encode(document.text, add_special_tokens=False).ids, 0]
            assert found.sizes[i] == len(document.text.encode())
        assert found.offsets[-1] == len(found.ids)


def test_encoded_tokens_are_read_from_the_cache_and_keyed_by_content(
    tmp_path: Path, tiny_teacher: Teacher, tiny_text: Path, write_teacher: Callable[..., Path]
) -> None:
    corpus = user_corpus(tiny_text)
    first = token_splits(tiny_teacher, corpus, tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again = token_splits(tiny_teacher, corpus, tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == files
    assert all(np.array_equal(first[s].ids, again[s].ids) for s in SPLITS)
    other = load_teacher(str(write_teacher(tmp_path / "other", seed=1)))
    token_splits(other, corpus, tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2


@pytest.mark.parametrize("damage", ["index", "tokens", "no tokens"])
def test_damaged_tokens_are_encoded_again(tmp_path: Path, tiny_teacher: Teacher, tiny_text: Path, damage: str) -> None:
    corpus = user_corpus(tiny_text)
    first = token_splits(tiny_teacher, corpus, tmp_path)
    index = next((tmp_path / "tokens").glob("*/search.json"))
    data = index.with_suffix(".u32")
    if damage == "index":
        index.write_text('{"offsets": [0, 1')
    elif damage == "tokens":
        data.write_bytes(data.read_bytes()[:-8])
    else:
        data.unlink()
    expected = np.array(first["train"].ids), first["search"].offsets
    with pytest.warns(RuntimeWarning, match=r"search\.json (is damaged|cannot be read)"):
        again = token_splits(tiny_teacher, corpus, tmp_path)
    assert np.array_equal(again["search"].offsets, expected[1]) and len(again["search"].ids) == expected[1][-1]
    assert np.array_equal(again["train"].ids, expected[0])


def split_of(lengths: list[int]) -> TokenSplit:
    offsets = np.cumsum([0, *lengths])
    return TokenSplit(
        np.arange(1, offsets[-1] + 1, dtype=np.uint32),
        offsets.astype(np.int64),
        np.array([3 * n for n in lengths], np.int64),
        tuple(map(str, range(len(lengths)))),
    )


def scored_positions(split: TokenSplit, length: int) -> list[tuple[int, int]]:
    """Slow oracle: (document, global position) of every token that has a predecessor in its window."""
    found = []
    for d in range(len(split.names)):
        for position in range(int(split.offsets[d]), int(split.offsets[d + 1])):
            if (position - int(split.offsets[d])) % length != 0:
                found.append((d, position))
    return found


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(2, 12))
def test_every_target_is_counted_exactly_once_and_padding_never(lengths: list[int], length: int) -> None:
    split = split_of(lengths)
    windows = split.windows(length)
    counted = []
    for row, n, d in zip(windows.ids, windows.targets, windows.cluster, strict=True):
        for column in range(1, int(n) + 1):
            assert row[column] == row[column - 1] + 1, (
                "a window must not cross documents or hold padding among its targets"
            )
            counted.append((int(d), int(row[column]) - 1))  # token ids are positions + 1, padding is 0
        assert (row[int(n) + 1 :] == 0).all()
    assert sorted(counted) == scored_positions(split, length)
    assert len(set(counted)) == len(counted) == windows.total_targets
    assert windows.bytes_per_token == pytest.approx(3.0)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(2, 12), st.integers(1, 60))
def test_thinned_windows_are_some_of_all_windows_without_repetition(lengths: list[int], length: int, most: int) -> None:
    split = split_of(lengths)
    whole, thin = split.windows(length), split.windows(length, most)
    rows = [tuple(row) for row in whole.ids.tolist()]
    chosen = [rows.index(tuple(row)) for row in thin.ids.tolist()]
    assert chosen == sorted(set(chosen))
    assert len(chosen) >= 1
    if whole.total_targets <= most:
        assert chosen == list(range(len(rows)))
    else:
        assert thin.total_targets <= most + 2 * length + 0.5 * len(rows)
    assert [whole.cluster[i] for i in chosen] == thin.cluster.tolist()
