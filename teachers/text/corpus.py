"""The text of a search, read from the interpreter's library or from the user's files, split four ways by document.

The splits never share a document: `train` feeds distillation, `calibration` the activation statistics, `search` the
rung-0 scores and `report` the confirmations. The report split is read only when a candidate is confirmed.
For the standard library, `search` and `report` are drawn from the modules the embedded teacher never saw.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Literal

from paretune.common.errors import UsageError
from paretune.teachers.text.decoding import decode, suffix_of
from paretune.teachers.text.own_output import walk
from paretune.teachers.text.records import RECORD_SUFFIXES, first_keys, read_records

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
    ".tsv",
}
# Files that hold text, but not as it lies in them.
NO_TEXT = {
    ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx", ".zip", ".tar", ".tgz", ".7z", ".rar",
    ".arrow", ".feather", ".orc", ".avro", ".h5", ".npy", ".npz", ".pt", ".bin", ".pkl", ".safetensors", ".onnx", ".gguf", ".db", ".sqlite",
}  # fmt: skip
BLOCK_CHARACTERS, LONG_CHARACTERS = 4000, 16_000
MIN_DOCUMENTS = 8
MIN_CHARACTERS = 40_000
# Below either, the documents are too few or too unequal to be divided whole.
FEW_DOCUMENTS = 32
FEW_CHARACTERS: dict[Split, int] = {"train": 100_000, "calibration": 2_500, "search": 2_500, "report": 2_500}


@dataclass(frozen=True)
class Document:
    """One unit of the split: a module, a file, a JSON line or a block of a long text file."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """All documents of one source, already split. `source` says in words where they come from, `read` what of it was read, what was
    left out and why."""

    source: str
    splits: dict[Split, tuple[Document, ...]]
    read: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """SHA-256 over names and texts of every split, 16 hex digits; figures are comparable only if it is equal."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for document in self.splits[split]:
                digest.update(f"{split}\0{document.name}\0".encode("utf8", "replace"))
                digest.update(hashlib.sha256(document.text.encode("utf8", "replace")).digest())
        return digest.hexdigest()[:16]


def library_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
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


def chosen_corpus(data: str | None, field: str | None = None) -> Corpus:
    """The text that --data and --field name, the standard library without them. Raises UsageError."""
    if data is None:
        if field is not None:
            raise UsageError(
                f"--field names the text in a file of records, but --field {field} is given without --data",
                "add --data FILE",
            )
        return library_corpus()
    return user_corpus(Path(data), field)


def user_corpus(path: Path, field: str | None = None) -> Corpus:
    """The user's own text: a text file, a file of records (`field` names their text), either of them compressed, or a folder of them.

    Documents are assigned by the hash of their text: 87 % train, 3 % calibration, 4 % search, 6 % report, and the smallest splits are
    topped up so that none is empty. Where documents are few or very unequal, the long ones are first cut into blocks, as a single
    text file always is. Raises UsageError if the text is missing, undecodable or too small.
    """
    reader = Reader(path, field)
    documents = [document for document in reader.documents() if document.text.strip()]
    unique = _unique(documents)
    longest = _longest_whole(unique)
    pieces = [piece for document in unique for piece in _blocks(document, longest)]
    if len(pieces) > len(unique):
        whole, unique = len(unique), _unique([piece for piece in pieces if piece.text.strip()])
        reader.told.append(
            f"{whole} documents are too few or too unequal to be divided whole, so those longer than {longest:,} characters are cut "
            f"into blocks of {BLOCK_CHARACTERS:,}, of which neighbours may fall into different parts"
        )
    told = (*reader.told, *_counted(reader.read, documents, unique))
    characters = sum(len(document.text) for document in unique)
    if len(unique) < MIN_DOCUMENTS or characters < MIN_CHARACTERS:
        raise UsageError(
            f"the text must have at least {MIN_DOCUMENTS} distinct documents and {MIN_CHARACTERS:,} characters, but "
            f"{path} has {len(unique)} and {characters:,} ({'; '.join(told)})",
            "give more text with --data",
        )
    return Corpus(str(path), _divided(unique), told)


def _unique(documents: list[Document]) -> list[Document]:
    """One document of each text, by the hash of it."""
    found = {hashlib.sha256(document.text.encode()).digest(): document for document in documents}
    return [document for _, document in sorted(found.items(), key=lambda pair: pair[0])]


def _divided(ordered: list[Document]) -> dict[Split, tuple[Document, ...]]:
    n = len(ordered)
    n_report, n_search, n_calibration = max(2, round(0.06 * n)), max(2, round(0.04 * n)), max(1, round(0.03 * n))
    cuts = (0, n_report, n_report + n_search, n_report + n_search + n_calibration, n)
    names: tuple[Split, ...] = ("report", "search", "calibration", "train")
    return {
        name: tuple(sorted(ordered[a:b], key=lambda d: d.name))
        for name, a, b in zip(names, cuts, cuts[1:], strict=False)
    }


def _longest_whole(ordered: list[Document]) -> int:
    """Up to how many characters a document stays whole: any number, unless dividing them whole leaves a part with too little."""
    sizes = [len(document.text) for document in ordered]
    if len(sizes) < MIN_DOCUMENTS:
        return BLOCK_CHARACTERS
    splits = _divided(ordered)
    poor = any(sum(len(d.text) for d in splits[split]) < least for split, least in FEW_CHARACTERS.items())
    uneven = len(sizes) < FEW_DOCUMENTS or 2 * max(sizes) > sum(sizes) or poor
    return LONG_CHARACTERS if uneven else max(sizes)


def _blocks(document: Document, longest_whole: int) -> list[Document]:
    if len(document.text) <= longest_whole:
        return [document]
    starts = range(0, len(document.text), BLOCK_CHARACTERS)
    return [Document(f"{document.name}:{start}", document.text[start : start + BLOCK_CHARACTERS]) for start in starts]


def _counted(read: Counter[str], documents: list[Document], unique: list[Document]) -> list[str]:
    """What became of the documents, in words."""
    empty = read["documents"] - len(documents)
    repeated = len({document.text for document in documents}) - len(documents)
    parts = [f"{len(unique):,} documents"]
    parts += [
        f"{n:,} {what} left out" for n, what in ((empty, "empty"), (-repeated, "repeated"), (read["null"], "null")) if n
    ]
    return [", ".join(parts)]


@dataclass
class Reader:
    """Reads a file or folder; `told` says afterwards what was read and what was not, `read` counts documents and null records."""

    path: Path
    field: str | None
    told: list[str] = dataclass_field(default_factory=list)
    read: Counter[str] = dataclass_field(default_factory=Counter)

    def documents(self) -> Iterator[Document]:
        """All documents, empty and repeated ones too. Raises UsageError."""
        if not _exists(self.path):
            raise UsageError(
                f"--data must name an existing file or folder, but {self.path} does not exist", "check the path"
            )
        found = self._folder() if self.path.is_dir() else self._file()
        for document in found:
            self.read["documents"] += 1
            yield document

    def _file(self) -> Iterator[Document]:
        path, kind = self.path, suffix_of(self.path)
        if kind in NO_TEXT:
            raise UsageError(f"{path} is a {kind} file, which is not read as text", "save its text as .txt or .jsonl")
        if kind in RECORD_SUFFIXES:
            if self.field is None:
                raise _field_is_needed(path, kind)
            self.told.append(f"{path.name}: the field {self.field!r} of its records")
            yield from self._records(path, path.name, self.field)
            return
        if self.field is not None:
            raise UsageError(
                f"--field names the text in a file of records ({', '.join(RECORD_SUFFIXES)}), but {path} is read as plain text",
                "leave --field out, or give the file the ending of what it is",
            )
        self.told.append(f"{path.name}: plain text in blocks of {BLOCK_CHARACTERS:,} characters")
        text = decode(path)
        for start in range(0, len(text), BLOCK_CHARACTERS):
            yield Document(f"{path.name}:{start}", text[start : start + BLOCK_CHARACTERS])

    def _folder(self) -> Iterator[Document]:
        walked = walk(self.path)
        records = [file for file in walked.files if self._is_record_file(file)]
        plain = [file for file in walked.files if file not in set(records) and suffix_of(file) in SOURCE_SUFFIXES]
        left = Counter(suffix_of(f) or f.name for f in set(walked.files) - {*plain, *records})
        reasons = walked.skipped
        told = [f"{n} {reason}" for reason, n in sorted(reasons.items())]
        told += [f"{n} {suffix}{self._why_not(suffix)}" for suffix, n in sorted(left.items())]
        if not plain and not records:
            found = f"; left out: {', '.join(told)}" if told else ""
            raise UsageError(
                f"the folder {self.path} holds no text file ({', '.join(sorted(SOURCE_SUFFIXES))}){found}",
                "add --field NAME to read records"
                if set(left) & set(RECORD_SUFFIXES)
                else "name a folder of source or text files",
            )
        if self.field is not None and not records:
            raise UsageError(
                f"--field names the text in files of records ({', '.join(RECORD_SUFFIXES)}), but {self.path} holds none",
                "leave --field out",
            )
        if plain:
            self.told.append(f"read as plain text: {_endings(plain)}")
        if self.field is not None:
            self.told.append(f"read as records, their field {self.field!r}: {_endings(records)}")
        if told:
            self.told.append(f"left out: {', '.join(told)}")
        for file in [*plain, *records]:
            name = file.relative_to(self.path).as_posix().encode("utf8", "replace").decode()  # a name need not be UTF-8
            if file in set(plain):
                yield Document(name, decode(file))
            elif self.field is not None:
                yield from self._records(file, name, self.field)

    def _is_record_file(self, file: Path) -> bool:
        return self.field is not None and suffix_of(file) in RECORD_SUFFIXES

    def _why_not(self, suffix: str) -> str:
        return " (records: add --field NAME)" if suffix in RECORD_SUFFIXES else ""

    def _records(self, path: Path, name: str, field: str) -> Iterator[Document]:
        for where, text in read_records(path, field):
            if text is None:
                self.read["null"] += 1
            else:
                yield Document(f"{name}:{where}", text)


def _endings(files: list[Path]) -> str:
    counts = Counter(suffix_of(file) for file in files)
    return ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _field_is_needed(path: Path, kind: str) -> UsageError:
    keys = []
    with contextlib.suppress(UsageError):
        keys = first_keys(path)
    known = f"; its first record has text in {', '.join(keys[:8])}" if keys else ""
    return UsageError(
        f"{path} is a {kind} file, so the name of its text field is needed{known}",
        f"add --field {keys[0] if len(keys) == 1 else 'NAME'}",
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False
