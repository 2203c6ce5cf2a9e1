"""The file and the lock of a study.

WAL with synchronous=FULL: a committed row survives SIGKILL and power loss.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import sqlalchemy as sa

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.file_access import is_file, unwritable
from paretune.common.files import free_bytes, sync_folder

BUSY_TIMEOUT_MS = 20_000
PROBE_S = 0.2
UNBORN = "unborn.db"
LEAST_FREE = 2**18  # bytes that a reader's own files may need


def open_engine(folder: Path, mode: str, name: str = "study.db") -> sa.Engine:
    """The study's database by SQLite mode: "ro", "rw", or "rwc" to create it."""
    path = folder.resolve() / name
    address = f"file:{quote(str(path))}?mode={mode}"
    if mode == "ro" and not _can_be_read_as_usual(folder, path):
        address += "&immutable=1"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(address, uri=True, check_same_thread=False)
        connection.text_factory = _text
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.QueuePool)

    def configure(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA foreign_keys=ON")
        if mode != "ro":
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    sa.event.listen(engine, "connect", configure)
    return engine


def _text(data: bytes) -> str:
    """Bytes that are no UTF-8 would stop the reading of all rows."""
    return data.decode("utf8", "replace")


def _can_be_read_as_usual(folder: Path, path: Path) -> bool:
    """Even a reader of WAL makes files beside the database, which a read-only or full disk does not take; where nothing has been
    written since the log was taken in and nobody writes, the file alone is the whole database."""
    with contextlib.suppress(OSError):
        if path.with_name(f"{path.name}-wal").stat().st_size:
            return True
    return is_taken(folder) or (os.access(folder, os.W_OK) and free_bytes(folder) >= LEAST_FREE)


def create_database(folder: Path, metadata: sa.MetaData, fill: Callable[[sa.Engine], None]) -> None:
    """Make `study.db` with its tables and what `fill` writes; it appears whole or not at all, so no reader meets it half made.

    Raises sqlalchemy's OperationalError if the disk refuses.
    """
    for leftover in folder.glob(f"{UNBORN}*"):
        leftover.unlink()
    engine = open_engine(folder, "rwc", UNBORN)
    try:
        metadata.create_all(engine)
        fill(engine)
    finally:
        engine.dispose()  # the last connection takes the write-ahead log into the file
    (folder / UNBORN).replace(folder / "study.db")
    sync_folder(folder)


def require_study(folder: Path) -> None:
    """Raises UsageError if there is no study in `folder`."""
    if not is_file(folder / "study.db"):
        known = sorted(p.parent.name for p in folder.parent.glob("*/study.db"))
        raise UsageError(f"no study is called {folder.name!r}", f"known studies: {', '.join(known) or 'none yet'}")


def take_lock(folder: Path) -> IO[str]:
    """The kernel lock of a study; released when the process ends, however it ends.

    Raises EnvironmentProblem if another process has it or the folder cannot be written.
    """
    try:
        lock = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder / "lock", error, "search with another --home", "the study's lock") from None
    deadline = time.monotonic() + PROBE_S
    while not _locked(lock, fcntl.LOCK_EX):
        if time.monotonic() > deadline:  # not a reader that only looked whether it is taken
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise EnvironmentProblem(
                f"a search is running on the study {folder.name!r} ({holder})",
                "wait for it, or stop it with Ctrl-C there",
            )
        time.sleep(0.02)
    with contextlib.suppress(OSError):  # who holds it is only told: a full disk does not take the lock away
        lock.seek(0)
        lock.truncate()
        lock.write(f"pid {os.getpid()}")
        lock.flush()
    return lock


def is_taken(folder: Path) -> bool:
    """Whether a process holds the study's lock, that is, a search or `sync` runs on it just now."""
    try:
        with (folder / "lock").open(encoding="utf-8") as lock:
            return not _locked(lock, fcntl.LOCK_SH)
    except OSError:
        return False


def _locked(lock: IO[str], mode: int) -> bool:
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def folder_gone(folder: Path) -> EnvironmentProblem:
    """What to raise when a study disappears while a search runs on it."""
    return EnvironmentProblem(
        f"the study folder {folder} was removed or unmounted while the search ran on it",
        "bring it back and run the same command again, or search anew",
    )
