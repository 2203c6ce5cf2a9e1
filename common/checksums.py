"""Checksums of an artifact: written with it, verified whenever it is loaded. Light: no torch, no onnx."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from paretune.common.errors import UsageError
from paretune.common.file_access import is_file, require_readable
from paretune.common.files import sync_folder, sync_tree

CHECKSUMS = "SHA256SUMS"
FACTS = "paretune.json"
MODEL = Path("onnx") / "model.onnx"


def check_artifact(folder: Path) -> dict[str, Any]:
    """The facts of a complete, undamaged artifact. Raises UsageError naming the file that is missing or changed."""
    sums = folder / CHECKSUMS
    if not is_file(sums):
        raise UsageError(f"{folder} is not an artifact: it has no {CHECKSUMS}", "name the folder that a search wrote")
    require_readable(sums)
    listed = set()
    for line in sums.read_text("utf8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        listed.add(path)
        if Path(name).is_absolute() or ".." in Path(name).parts or path.resolve() != folder.resolve() / name:
            raise UsageError(
                f"{sums} names {name}, which lies outside the artifact", "use an artifact from a source you trust"
            )
        if not is_file(path) or _readable_sha256(path) != digest:
            raise UsageError(f"{path} is missing or differs from its checksum", "copy the artifact again")
    present = {path for path in folder.rglob("*") if path.is_file() and path != sums}
    for path in sorted({folder / MODEL, folder / FACTS} | present):
        if path not in listed:
            raise UsageError(f"{sums} does not vouch for {path}", "copy the artifact again, and put nothing into it")
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def write_checksums(folder: Path) -> None:
    """Vouch for every file of `folder`, once all of them are safe on the disk."""
    sync_tree(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def _readable_sha256(path: Path) -> str:
    require_readable(path)
    return sha256(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
