"""The text of a search, read from the interpreter's library or from the user's files, split four ways by document.

The splits never share a document: `train` feeds distillation, `calibration` the activation statistics, `search` the
rung-0 scores and `report` the confirmations. The report split is read only when a candidate is confirmed.
For the standard library, `search` and `report` are drawn from the modules the embedded teacher never saw.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paretune.hardware_profiles.access import unreadable
from paretune.hardware_profiles.errors import UsageError

Split = Literal["train", "calibration", "search", "report"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "search", "report")
SKIPPED_FOLDERS = {"site-packages", "lib2to3", "idle_test", "encodings"}
SOURCE_SUFFIXES = {
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".java",
    ".js",
    ".ts",
    ".go",
    ".rs",
    ".rb",
    ".sh",
    ".sql",
    ".html",
    ".css",
    ".json",
    ".yaml",
    ".yml",
    ".toml",
    ".tex",
    ".csv",
}
BYTE_ORDER_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}
BLOCK_CHARACTERS = 4000
MIN_DOCUMENTS = 8
MIN_CHARACTERS = 40_000


@dataclass(frozen=True)
class Document:
    """One unit of the split: a module, a file, a JSON line or a block of a long text file."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """All documents of one source, already split. `source` says in words where they come from."""

    source: str
    splits: dict[Split, tuple[Document, ...]]

    def fingerprint(self) -> str:
        """SHA-256 over names and texts of every split, 16 hex digits; figures are comparable only if it is equal."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for document in self.splits[split]:
                digest.update(f"{split}\0{document.name}\0".encode("utf8", "replace"))
                digest.update(hashlib.sha256(document.text.encode("utf8", "replace")).digest())
        return digest.hexdigest()[:16]


def library_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def library_modules() -> list[tuple[str, Path]]:
    """Names (relative to the library, POSIX) and paths of the modules that the embedded teacher's corpus consists of."""
    root = library_root()
    paths = sorted(path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.parts))
    return [(path.relative_to(root).as_posix(), path) for path in paths]


def is_held_out(name: str) -> bool:
    """The embedded teacher's own rule: the first byte of the SHA-1 of the module's path is below 6."""
    return hashlib.sha1(name.encode()).digest()[0] < 6


def library_corpus() -> Corpus:
    """The running interpreter's standard library. Search gets about 30 % of the held-out modules, report the rest."""
    found: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    for name, path in library_modules():
        second = hashlib.sha1(name.encode()).digest()[1]
        if is_held_out(name):
            split: Split = "search" if second < 77 else "report"
        else:
            split = "calibration" if second < 5 else "train"
        found[split].append(Document(name, path.read_text("utf8", "ignore")))
    return Corpus("standard library of the running Python", {split: tuple(found[split]) for split in SPLITS})


def library_mismatches(heldout_file: Path) -> list[str]:
    """Held-out modules whose text differs from the one the embedded teacher was judged on (another Python version)."""
    expected: dict[str, str] = json.loads(heldout_file.read_text(encoding="utf-8"))["modules"]
    actual = {
        name: hashlib.sha256(path.read_text("utf8", "ignore").encode()).hexdigest()
        for name, path in library_modules()
        if is_held_out(name)
    }
    return sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))


def user_corpus(path: Path, field: str | None = None) -> Corpus:
    """The user's own text: a .txt file, a .jsonl file (`field` names the text column) or a folder of text files.

    Documents are assigned by the hash of their text: 87 % train, 3 % calibration, 4 % search, 6 % report, and the
    smallest splits are topped up so that none is empty. Raises UsageError if the text is missing, undecodable or too small.
    """
    documents = [document for document in _read(path, field) if document.text.strip()]
    unique = list({hashlib.sha256(document.text.encode()).digest(): document for document in documents}.items())
    characters = sum(len(document.text) for _, document in unique)
    if len(unique) < MIN_DOCUMENTS or characters < MIN_CHARACTERS:
        raise UsageError(
            f"the text must have at least {MIN_DOCUMENTS} distinct documents and {MIN_CHARACTERS:,} characters, but "
            f"{path} has {len(unique)} and {characters:,}",
            "give more text with --data",
        )
    ordered = sorted(unique, key=lambda pair: pair[0])
    n = len(ordered)
    n_report, n_search, n_calibration = max(2, round(0.06 * n)), max(2, round(0.04 * n)), max(1, round(0.03 * n))
    cuts = (0, n_report, n_report + n_search, n_report + n_search + n_calibration, n)
    names: tuple[Split, ...] = ("report", "search", "calibration", "train")
    splits = {
        name: tuple(sorted((d for _, d in ordered[a:b]), key=lambda d: d.name))
        for name, a, b in zip(names, cuts, cuts[1:], strict=False)
    }
    return Corpus(str(path), splits)


def _read(path: Path, field: str | None) -> Iterator[Document]:
    if not _exists(path):
        raise UsageError(f"--data must name an existing file or folder, but {path} does not exist", "check the path")
    if path.is_dir():
        files = sorted(
            p for p in path.rglob("*") if p.is_file() and p.suffix in SOURCE_SUFFIXES and ".git" not in p.parts
        )
        if not files:
            raise UsageError(
                f"the folder {path} holds no text file ({', '.join(sorted(SOURCE_SUFFIXES))})",
                "name a folder of source or text files",
            )
        for file in files:
            name = file.relative_to(path).as_posix().encode("utf8", "replace").decode()  # a name need not be UTF-8
            yield Document(name, _decode(file))
    elif path.suffix == ".jsonl":
        yield from _json_lines(path, field)
    else:
        text = _decode(path)
        for start in range(0, len(text), BLOCK_CHARACTERS):
            yield Document(f"{path.name}:{start}", text[start : start + BLOCK_CHARACTERS])


def _json_lines(path: Path, field: str | None) -> Iterator[Document]:
    if field is None:
        raise UsageError(f"{path} is a .jsonl file, so the name of its text field is needed", "add --field NAME")
    for number, line in enumerate(_decode(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}:{number}:{error.colno}: not valid JSON ({error.msg})", "mend or drop that line"
            ) from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UsageError(
                f"{path}:{number}: the field {field!r} must hold text; this line has {keys}",
                "name the text field with --field",
            )
        yield Document(
            f"{path.name}:{number}", record[field].encode("utf8", "replace").decode()
        )  # lone surrogates become "?"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _decode(path: Path) -> str:
    """The text of a file. Raises UsageError with its line where it is not UTF-8, or holds zero bytes as UTF-16 and binaries do."""
    if not path.is_file():
        raise UsageError(
            f"--data must name a regular file or a folder, but {path} is neither", "save the text as a file"
        )
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the mark that some editors begin UTF-8 with
        text = data.decode("utf8")
    except UnicodeDecodeError as error:
        raise _wrong_encoding(path, data, error.start) from None
    except OSError as error:
        raise unreadable(path, error) from None
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
