"""Logs of searches: bounded, and the words with which a search has failed are never cut away."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MOST_LOG_BYTES = 8 * 2**20
KEPT_PART = 4  # of a log that is cut, the last quarter is kept beside it
READ_BYTES, TOLD_CHARACTERS = 64 * 1024, 2000
DATA = ("{", "}", "[", "]", '"')  # of what --json writes
WORDS = ("error:", "remedy:")


class SearchLog:
    """The log of one search, and beside it the end of the part before it, once it has become too long."""

    def __init__(self, path: Path) -> None:
        self.path, self.before = path, path.with_suffix(".before.log")

    def trim(self, most_bytes: int = MOST_LOG_BYTES) -> None:
        """Cut a log that is too long; its writer appends to it meanwhile."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size > most_bytes:
                self.before.write_bytes(_end_of(self.path, most_bytes // KEPT_PART))
                os.truncate(self.path, 0)

    def words(self) -> str:
        """The last error and its remedy, else the last lines."""
        text = b"".join(_end_of(path, READ_BYTES) for path in (self.before, self.path)).decode("utf8", "replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = next((i for i in reversed(range(len(lines))) if lines[i].startswith("error:")), None)
        talk = [line for line in lines if not line.startswith(DATA)]
        found = talk[-3:] if last is None else [line for line in lines[last:] if line.startswith(WORDS)][:2]
        return " ".join(found)[-TOLD_CHARACTERS:]


def _end_of(path: Path, most_bytes: int) -> bytes:
    with contextlib.suppress(OSError), path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - most_bytes))
        return stream.read(most_bytes)
    return b""
