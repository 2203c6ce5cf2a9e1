"""The bytes of a text file as text: decompressed by its name, UTF-8 only, with the line of what is wrong."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from paretune.common.errors import UsageError
from paretune.common.file_access import unreadable

BYTE_ORDER_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstandard.open}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def suffix_of(path: Path) -> str:
    """What kind of file its name says it is, in lower case, without a compression's own suffix: ".jsonl" for A.JSONL.GZ."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in OPENERS else suffix


def read_bytes(path: Path) -> bytes:
    """The file's content, decompressed where its name ends in .gz, .bz2, .xz or .zst. Raises UsageError."""
    if not path.is_file():
        raise UsageError(
            f"--data must name a regular file or a folder, but {path} is neither", "save the text as a file"
        )
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as stream:
            found: bytes = stream.read()
            return found
    except DAMAGED as error:
        raise UsageError(f"{path} is damaged: {error}", "copy or compress it again") from None
    except OSError as error:
        if error.strerror:
            raise unreadable(path, error) from None
        raise UsageError(f"{path} cannot be read: {error}", "copy or compress it again") from None  # gzip's own error


def decode(path: Path) -> str:
    """The text of a file. Raises UsageError with its line where it is not UTF-8, or holds zero bytes as UTF-16 and binaries do."""
    data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")  # the mark that some editors begin UTF-8 with
    try:
        text = data.decode("utf8")
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, data, error.start) from None
    if "\0" in text:
        raise _wrong_encoding(path, data, data.index(b"\0"))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _wrong_encoding(path: Path, data: bytes, where: int) -> UsageError:
    line = data[:where].count(b"\n") + 1
    guess = next((name for name, marks in BYTE_ORDER_MARKS.items() if data.startswith(marks)), None)
    near = data[max(0, where - 8) :][:16]
    if guess is None and sorted(near[parity::2].count(0) > 5 for parity in (0, 1)) == [False, True]:
        guess = "UTF-16"  # every other byte is zero
    known = f", and the file looks like {guess}" if guess else ""
    return UsageError(
        f"{path}:{line}: the text must be UTF-8, but byte {where} is 0x{data[where]:02x}{known}",
        f"convert it: iconv -f {guess or 'ITS-ENCODING'} -t UTF-8 {path.name} > converted.txt",
    )
