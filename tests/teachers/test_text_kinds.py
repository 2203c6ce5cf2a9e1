"""What each kind of text file gives: the text of its records, or a refusal that names the file, the line and the remedy."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from paretune.common.errors import UsageError
from paretune.teachers.text.corpus import SPLITS, Corpus, chosen_corpus, user_corpus

N = 40


@pytest.fixture
def records(generated_document: Callable[..., str]) -> list[dict[str, Any]]:
    return [{"id": i, "text": generated_document(i, 300)} for i in range(N)]


def texts(corpus: Corpus) -> list[str]:
    return sorted(document.text for split in SPLITS for document in corpus.splits[split])


def refused(path: Path, field: str | None = None) -> UsageError:
    with pytest.raises(UsageError) as caught:
        user_corpus(path, field)
    return caught.value


def lines(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(records: list[dict[str, Any]], path: Path, delimiter: str) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows([r["id"], r["text"]] for r in records)
    return path


@pytest.mark.parametrize(
    "make",
    [
        json.dumps,
        lambda found: json.dumps(found, indent=2),
        lines,
        lambda found: json.dumps({"version": 1, "data": found}),
        lambda found: json.dumps({"text": [r["text"] for r in found]}),
        lambda found: "\ufeff" + json.dumps(found),
        lambda found: lines(found).replace("\n", "\r\n\r\n"),
    ],
    ids=["array", "indented", "lines", "object", "column", "byte order mark", "CRLF and empty lines"],
)
def test_json_under_any_layout_gives_the_text_of_its_records(
    tmp_path: Path, records: list[dict[str, Any]], make: Callable[[Any], str]
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(make(records).encode())
    assert texts(user_corpus(path, "text")) == sorted(r["text"] for r in records)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".JSONL"])
@pytest.mark.parametrize(
    ("ending", "pack"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_lines_are_read_compressed_or_not(
    tmp_path: Path, records: list[dict[str, Any]], suffix: str, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"x{suffix}{ending}"
    path.write_bytes(pack(lines(records).encode()))
    assert texts(user_corpus(path, "text")) == sorted(r["text"] for r in records)
    assert "so the name of its text field is needed; its first record has text in text" in refused(path).problem


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_a_column_of_a_table(tmp_path: Path, records: list[dict[str, Any]], suffix: str, delimiter: str) -> None:
    path = table(records, tmp_path / f"x{suffix}", delimiter)  # the texts hold commas no, but newlines
    assert texts(user_corpus(path, "text")) == sorted(r["text"] for r in records)
    assert refused(path, "Text_").remedy == "did you mean --field text?"
    assert "field is needed; its first record has text in id, text" in refused(path).problem
    with path.open("a") as stream:
        stream.write("one\n")
    assert "a row must have 2 columns as the header, but has 1" in refused(path, "text").problem
    with path.open("a") as stream:
        stream.write(f'2{delimiter}"never closed\n')
    assert str(path) in refused(path, "text").problem


def test_a_column_of_a_parquet_file(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{**r, "meta": {"body": r["text"]}} for r in records]), path)
    assert texts(user_corpus(path, "text")) == sorted(r["text"] for r in records)
    assert texts(user_corpus(path, "meta.body")) == sorted(r["text"] for r in records)
    assert refused(path, "txt").remedy == "did you mean --field text?"
    assert "holds a number" in refused(path, "id").problem
    path.write_bytes(path.read_bytes()[:-50])
    assert f"{path} cannot be read as Parquet" in refused(path, "text").problem


def test_a_field_that_is_none_is_refused_with_the_nearest(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(records))
    problem = refused(path, "texts")
    assert f"{path}, record 1: the field 'texts' must hold text; this line has id, text" in problem.problem
    assert problem.remedy == "did you mean --field text?"
    path.write_text(json.dumps([{"meta": {"text": "a"}}]))
    assert refused(path, "text").remedy == "did you mean --field meta.text?"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (5, "holds a number"),
        (True, "holds a boolean"),
        ({"a": 1}, "holds an object"),
        (["a"], "holds a list of 1"),
        ([{"role": "user", "content": "x"}], "holds a list of 1 messages"),
    ],
)
def test_a_field_that_holds_no_text_is_refused_by_its_line(
    tmp_path: Path, records: list[dict[str, Any]], value: Any, told: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines([*records[:7], {"text": value}, *records[7:]]))
    assert f"{path}:8: the field 'text' must hold text, but {told}" in refused(path, "text").problem


def test_null_empty_and_repeated_records_are_counted(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines([*records, {"text": None}, {"text": None}, {"text": " "}, records[3]]))
    corpus = user_corpus(path, "text")
    assert texts(corpus) == sorted(r["text"] for r in records)
    assert corpus.read[-1] == f"{N} documents, 1 empty left out, 1 repeated left out, 2 null left out"


@pytest.mark.parametrize(
    ("broken", "told"),
    [('{"text": "a",}', ":8:"), ('{"text": "a"},', ":8:"), ('{"text": "a', ":8:"), ("[" * 100_000, ":8: JSON")],
    ids=["trailing comma", "comma after", "cut off", "too deep"],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_one_broken_line_is_named(
    tmp_path: Path, records: list[dict[str, Any]], name: str, broken: str, told: str
) -> None:
    path = tmp_path / name
    path.write_text(lines(records[:7]) + broken + "\n" + lines(records[7:]))
    assert f"{path}{told}" in refused(path, "text").problem


def test_a_broken_array_names_its_line(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    path = tmp_path / "x.json"
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + ",\n]\n")
    assert f"{path}:{N + 2}:1: not valid JSON" in refused(path, "text").problem
    path.write_text(json.dumps({"train": records, "test": records}))
    assert "must hold one array of records, but holds 2: train, test" in refused(path, "text").problem
    path.write_text("5")
    assert "holds a number" in refused(path, "text").problem


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.csv"])
def test_other_encodings_are_refused_by_line(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes("text\n{}\nzwölf\n".encode(encoding))
    problem = refused(path, None if name == "x.txt" else "text")
    assert "the text must be UTF-8" in problem.problem and "iconv" in problem.remedy


@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.zst", "x.txt.bz2", "x.txt.xz"])
def test_what_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"plain text" * 20)
    assert str(path) in refused(path, None if ".txt" in name else "text").problem
    whole: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress,
        "zst": zstandard.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }
    path.write_bytes(whole[name.rsplit(".", 1)[1]](bytes(range(256)) * 400)[:-9])
    assert str(path) in refused(path, None if ".txt" in name else "text").problem


@pytest.mark.parametrize("name", ["x.pdf", "x.docx", "x.tar.gz", "x.safetensors", "x.ZIP"])
def test_files_that_hold_no_plain_text_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("looks like text " * 5000)
    assert "is not read as text" in refused(tmp_path / name).problem


def test_a_field_without_records_is_refused(tmp_path: Path, tiny_text: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("".join(p.read_text() for p in sorted(tiny_text.iterdir())))
    assert "is read as plain text" in refused(book, "text").problem
    assert "but" in refused(tiny_text, "text").problem and "holds none" in refused(tiny_text, "text").problem
    with pytest.raises(UsageError, match="--field text is given without --data"):
        chosen_corpus(None, "text")


def test_a_folder_that_mixes_kinds_says_what_is_read(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    for record in records[:30]:
        (tmp_path / f"{record['id']}.txt").write_text(record["text"])
    (tmp_path / "more.jsonl").write_text(lines(records[30:]))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    without = user_corpus(tmp_path)
    assert texts(without) == sorted(r["text"] for r in records[:30])
    assert without.read[:2] == ("read as plain text: 30 .txt", "left out: 1 .jsonl (records: add --field NAME), 1 .png")
    whole = user_corpus(tmp_path, "text")
    assert texts(whole) == sorted(r["text"] for r in records)
    assert whole.read[1] == "read as records, their field 'text': 1 .jsonl"
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    problem = refused(tmp_path)
    assert "1 .jsonl (records: add --field NAME)" in problem.problem and "--field" in problem.remedy
