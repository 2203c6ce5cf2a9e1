"""Records with a text field: JSON lines, a JSON array, a table (.csv, .tsv) or a Parquet file."""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune.common.errors import UsageError
from paretune.teachers.text.decoding import decode, suffix_of

JSON_LINES, TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
RECORD_SUFFIXES = (*JSON_LINES, ".json", *TABLES, ".parquet")
# The number of its line, or of the record where there are no lines; how an error names the place; the record.
Record = tuple[int, str, Any]
MOST_KEYS = 12


def read_records(path: Path, field: str) -> Iterator[tuple[int, str | None]]:
    """The line (or number) and the text of each record of a file; None where it is null.

    `field` is a key, or keys joined by dots for a nested one. Raises UsageError with the line or record where there is no text.
    """
    for number, where, record in _records(path, field):
        yield number, _text(where, record, field)


def first_keys(path: Path) -> list[str]:
    """Where the file's first record has text: keys, those of nested records joined by dots. Raises UsageError."""
    return [key for _, _, record in itertools.islice(_records(path, ""), 1) for key in _text_keys(record)]


def _records(path: Path, field: str) -> Iterator[Record]:
    kind = suffix_of(path)
    if kind == ".parquet":
        return _parquet(path, field)
    text = decode(path)
    if kind in TABLES:
        return _table(path, text, TABLES[kind])
    return _lines(path, text) if kind in JSON_LINES else _json(path, text, field)


def _lines(path: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, f"{path}:{number}", _parsed(path, line, number)


def _parsed(path: Path, text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}:{error.colno}"
        raise UsageError(f"{where}: not valid JSON ({error.msg})", "mend or drop that line") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise UsageError(f"{path}:{line}: JSON that cannot be read ({error})", "mend or drop that line") from None


def _json(path: Path, text: str, field: str) -> Iterator[Record]:
    """An array of records, an object that holds one such array or a column of texts, or JSON lines under another name."""
    start = text.lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(start)
    except (RecursionError, ValueError):
        end = len(start)
    if start[end:].strip() and "\n" in start[end:]:  # more follows the first value
        yield from _lines(path, text)
        return
    value = _parsed(path, text)
    if isinstance(value, dict):
        value = _array_in(path, value, field)
    if not isinstance(value, list):
        raise UsageError(
            f"{path} must hold an array of records, or one record per line, but holds {_kind(value)}",
            "save it as JSON lines",
        )
    for number, record in enumerate(value, 1):
        yield number, f"{path}, record {number}", record


def _array_in(path: Path, value: dict[str, Any], field: str) -> list[Any]:
    column = value.get(field)
    if isinstance(column, list) and all(isinstance(text, str) for text in column):
        return [{field: text} for text in column]
    arrays = {key: v for key, v in value.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)}
    if len(arrays) > 1:
        raise UsageError(
            f"{path} must hold one array of records, but holds {len(arrays)}: {_few(list(arrays))}",
            "save the one that is meant as a file of its own",
        )
    return next(iter(arrays.values()), [value])


def _table(path: Path, text: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for row in rows:
            if not row:
                continue
            if header is None:
                header = row
                continue
            if len(row) != len(header):
                raise UsageError(
                    f"{path}:{rows.line_num}: a row must have {len(header)} columns as the header, but has {len(row)}",
                    "mend that line, or quote the text in it",
                )
            yield rows.line_num, f"{path}:{rows.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UsageError(f"{path}:{rows.line_num}: not a valid table ({error})", "mend that line") from None


def _parquet(path: Path, field: str) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UsageError(
            f"{path} is a Parquet file, but pyarrow is not installed", "install pyarrow, or save it as .jsonl"
        ) from None
    if suffix_of(path) != path.suffix.lower():
        raise UsageError(f"{path}: a Parquet file is compressed inside", "decompress it")
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name == field or field.startswith(f"{name}.")]
            number = 0
            for batch in file.iter_batches(columns=wanted or None, batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, f"{path}, record {number}", record
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path} cannot be read as Parquet: {error}", "copy it again, or save it as .jsonl") from None


def _text(where: str, record: Any, field: str) -> str | None:
    if not isinstance(record, dict):
        raise UsageError(
            f"{where}: the field {field!r} must hold text; this line has {_kind(record)} and no fields",
            'save every record as an object such as {"text": "…"}',
        )
    found, value = _look_up(record, field)
    if not found:
        raise UsageError(
            f"{where}: the field {field!r} must hold text; this line has {_few(list(record))}", _nearest(record, field)
        )
    if value is None:
        return None
    if not isinstance(value, str):
        listed = isinstance(value, list)
        remedy = (
            "write each as one string, such as the tokenizer's chat template gives" if listed else _nearest(record, "")
        )
        raise UsageError(f"{where}: the field {field!r} must hold text, but holds {_kind(value)}", remedy)
    return value.encode("utf8", "replace").decode()  # lone surrogates become "?"


def _look_up(record: dict[str, Any], field: str) -> tuple[bool, Any]:
    """Whether there is such a field, and its value: a key as it is written first, then keys joined by dots."""
    if field in record:
        return True, record[field]
    value: Any = record
    for key in field.split("."):
        if not isinstance(value, dict) or key not in value:
            return False, None
        value = value[key]
    return True, value


def _text_keys(record: Any, before: str = "") -> list[str]:
    if not isinstance(record, dict):
        return []
    found = [before + key for key, value in record.items() if isinstance(value, str)]
    for key, value in record.items():
        if isinstance(value, dict) and before.count(".") < 3:
            found += _text_keys(value, f"{before}{key}.")
    return found


def _nearest(record: dict[str, Any], field: str) -> str:
    keys = {key.lower(): key for key in reversed(_text_keys(record))}
    ends = [key for low, key in keys.items() if field and low.rpartition(".")[2] == field.lower()]
    near = ends or [keys[low] for low in difflib.get_close_matches(field.lower(), list(keys), 1, 0.5)]
    if near:
        return f"did you mean --field {near[0]}?"
    return (
        f"name the text field with --field: text is in {_few(list(keys.values()))}"
        if keys
        else "name the text field with --field"
    )


def _few(keys: list[str]) -> str:
    more = f" and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
    return ", ".join(str(key) for key in keys[:MOST_KEYS]) + more if keys else "no fields"


def _kind(value: Any) -> str:
    if isinstance(value, list):
        messages = value and all(isinstance(v, dict) and "content" in v for v in value)
        return f"a list of {len(value)}{' messages' if messages else ''}"
    names = {
        dict: "an object",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
