"""What SQLite's errors mean for the user: a disk that takes nothing, another writer, a file that is damaged.

Only SQLITE_CORRUPT and SQLITE_NOTADB say that a file is damaged, and a schema that lacks its tables; everything else passes when
the disk does, and a restore would put old data over good.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from paretune.common.errors import DiskProblem, EnvironmentProblem, ParetuneError
from paretune.common.files import disk_lack, disk_problem

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
DISK = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
)
LACKS = ("no such table", "no such column")


def code_of(error: sa.exc.DBAPIError) -> int:
    """SQLite's primary result code, 0 where there is none."""
    return int(getattr(error.orig, "sqlite_errorcode", 0) or 0) & 0xFF


def database_problem(error: sa.exc.DBAPIError, folder: Path, what: str = "the database") -> EnvironmentProblem:
    """The error in words; `folder` is where the database lies, `what` what it is called."""
    code, reason = code_of(error), str(error.orig)
    if code in DAMAGED or any(word in reason for word in LACKS):
        return EnvironmentProblem(f"{what} in {folder} is damaged: {reason}", "restore the folder from a backup")
    if code in BUSY:
        return EnvironmentProblem(f"{what} in {folder} is in use by another process: {reason}", "try again in a moment")
    if code in DISK:
        return _disk(code, reason, folder, what)
    return EnvironmentProblem(
        f"{what} in {folder} cannot be read or written: {reason}", "look at the disk and the memory"
    )


def _disk(code: int, reason: str, folder: Path, what: str) -> EnvironmentProblem:
    """SQLite does not say why a file cannot be opened or written, so it is tried: no space, no handle, no permission, read-only."""
    lack = disk_lack(folder)
    number = lack.errno if lack is not None else errno.ENOSPC if code == sqlite3.SQLITE_FULL else None
    problem = None if number is None else disk_problem(OSError(number, os.strerror(number)))
    if problem is not None:
        return DiskProblem(f"{problem.problem}; {what} in {folder}: {reason}", problem.remedy)
    remedy = "look at the folder's disk and permissions"
    told = f"{what} in {folder} cannot be opened or written: {reason}"
    return EnvironmentProblem(told if lack is None else f"{told} ({lack.strerror})", remedy)


@contextmanager
def told(folder: Path, what: str = "the database") -> Iterator[None]:
    """Errors of the database and of the disk under it as ParetuneErrors: EnvironmentProblem, DiskProblem where it is the disk's."""
    try:
        yield
    except ParetuneError:
        raise
    except sa.exc.DBAPIError as error:
        raise database_problem(error, folder, what) from error
    except OSError as error:
        problem = disk_problem(error)
        if problem is None and error.errno in (errno.EACCES, errno.EPERM):
            problem = EnvironmentProblem(f"{folder} cannot be written: {error.strerror}", "look at its permissions")  # type: ignore[assignment]
        if problem is None:
            raise
        raise problem from error
