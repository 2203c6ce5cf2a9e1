"""What clients have uploaded to an agent: files named by their SHA-256, at most so many bytes of them.

A file has its name only when it is complete and its checksum is right; names are digests, never paths. Beyond the limit the
files that were not used for longest go first, but never one that a job still needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import IO

DIGEST = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20


class WrongChecksum(ValueError):
    """What arrived is not what its name says."""


class Full(ValueError):
    """A file that does not fit under the limit beside what is still needed."""


class ContentStore:
    """Files below `folder`, `max_bytes` in all. Threads may share it; processes may not."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._coming: dict[str, int] = {}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.glob("*.part"):
            left.unlink()

    def path(self, digest: str) -> Path | None:
        """The file of this content, which counts as used now; None if it is not here."""
        if not DIGEST.fullmatch(digest):
            return None
        path = self.folder / digest
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
            return path
        return None

    def put(self, digest: str, stream: IO[bytes], length: int, needed: Collection[str] = ()) -> None:
        """Take `length` bytes from `stream` as the content of `digest`, once its checksum is seen to be right.

        Raises Full, WrongChecksum, or ConnectionError if the stream ends early; then nothing is kept.
        """
        temporary = self.folder / f"{uuid.uuid4().hex}.part"
        self._make_room(temporary.name, length, needed)
        try:
            with temporary.open("xb") as file:
                found = _copy(stream, file, length)
                file.flush()
                os.fsync(file.fileno())
            if found != digest:
                raise WrongChecksum(f"the SHA-256 of what arrived is {found}, not {digest}")
            temporary.replace(self.folder / digest)
        finally:
            temporary.unlink(missing_ok=True)
            with self._lock:
                del self._coming[temporary.name]

    def _make_room(self, name: str, length: int, needed: Collection[str]) -> None:
        """Reserve `length` bytes, sending away what was not used for longest. Nothing is sent away in vain."""
        with self._lock:
            files = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._files())
            total = length + sum(size for _, size, _ in files) + sum(self._coming.values())
            leaving = []
            for _, size, path in files:
                if total > self.max_bytes and path.name not in needed:
                    leaving.append(path)
                    total -= size
            if total > self.max_bytes:
                raise Full(
                    f"an agent keeps at most {self.max_bytes:,} bytes, and {length:,} more do not fit beside what its jobs need"
                )
            for path in leaving:
                path.unlink(missing_ok=True)
            self._coming[name] = length

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if DIGEST.fullmatch(path.name)]


def _copy(stream: IO[bytes], file: IO[bytes], length: int) -> str:
    """Copy exactly `length` bytes; returns their SHA-256."""
    digest, left = hashlib.sha256(), length
    while left:
        data = stream.read(min(CHUNK, left))
        if not data:
            raise ConnectionError(f"the upload ended {left:,} bytes early")
        digest.update(data)
        file.write(data)
        left -= len(data)
    return digest.hexdigest()
