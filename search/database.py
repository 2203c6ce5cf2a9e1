"""The file and the lock of a study.

WAL with synchronous=FULL: a committed row survives SIGKILL and power loss.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import sqlalchemy as sa

from paretune.hardware_profiles.errors import EnvironmentProblem, UsageError

BUSY_TIMEOUT_MS = 20_000


def open_engine(folder: Path, mode: str) -> sa.Engine:
    """The study's database by SQLite mode: "ro", "rw", or "rwc" to create it."""
    address = f"file:{quote(str(folder.resolve() / 'study.db'))}?mode={mode}"

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(address, uri=True, check_same_thread=False)

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


def require_study(folder: Path) -> None:
    """Raises UsageError if there is no study in `folder`."""
    if not (folder / "study.db").is_file():
        known = sorted(p.parent.name for p in folder.parent.glob("*/study.db"))
        raise UsageError(f"no study is called {folder.name!r}", f"known studies: {', '.join(known) or 'none yet'}")


def take_lock(folder: Path) -> IO[str]:
    """The kernel lock of a study; released when the process ends, however it ends."""
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise EnvironmentProblem(
            f"a search is running on the study {folder.name!r} ({holder})", "wait for it, or stop it with Ctrl-C there"
        ) from None
    lock.seek(0)
    lock.truncate()
    lock.write(f"pid {os.getpid()}")
    lock.flush()
    return lock
