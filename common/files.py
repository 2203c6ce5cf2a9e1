"""Writing files so that a reader never sees half of one, and reading them so that a damaged one is no crash."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

from paretune.common.errors import DiskProblem, EnvironmentProblem
from paretune.common.text import clean


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder, fsync it, rename it, fsync the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def require_folder(folder: Path) -> None:
    """Make a folder, such as a home, if it is not there. Raises EnvironmentProblem if it cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        there = next((path for path in (folder, *folder.parents) if path.exists() or path.is_symlink()), folder)
        raise EnvironmentProblem(f"{folder} must be a folder, but {there} is none", "name another --home") from None
    except OSError as error:
        raise disk_problem(error) or EnvironmentProblem(
            f"the folder {folder} cannot be made: {error.strerror}", "make it yourself, or name another --home"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Make everything inside `folder` survive power loss: every file, then the folders from the innermost out."""
    for path in sorted(folder.rglob("*"), key=lambda p: len(p.parts), reverse=True):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def read_kept(path: Path) -> Any | None:
    """A kept JSON file; None if there is none, or with a warning if it is damaged: what is kept may be lost, never trusted."""
    try:
        return json.loads(path.read_text("utf8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn_damaged(path, error)
        return None


def warn_damaged(path: Path, error: Exception) -> None:
    """Say that a kept file is not used."""
    reason = " ".join(str(error).split())[:200]
    what = "cannot be read" if isinstance(error, OSError) else "is damaged"
    warnings.warn(f"{path} {what} and is made anew ({type(error).__name__}: {reason})", RuntimeWarning, stacklevel=3)


REMEDIES = {
    errno.ENOSPC: ("the disk is full", "free the disk, then run the same command again: it goes on"),
    errno.EDQUOT: ("the disk quota is used up", "free some of your quota, then run the same command again: it goes on"),
    errno.EROFS: (
        "the disk is read-only",
        "mount it writable, then run the same command again: it goes on; or choose another disk with --home",
    ),
    errno.EMFILE: (
        "too many files are open",
        "raise the limit with `ulimit -n`, then run the same command again: it goes on",
    ),
    errno.ENFILE: (
        "too many files are open on this machine",
        "end other programs, then run the same command again: it goes on",
    ),
    errno.EIO: (
        "the disk has failed to read or write",
        "look at the disk, then run the same command again: it goes on",
    ),
}


def disk_problem(error: OSError) -> DiskProblem | None:
    """Return the error to raise if `error` is for want of disk or file handles, or a failing disk; None for others."""
    if error.errno not in REMEDIES:
        return None
    rule, remedy = REMEDIES[error.errno]
    where = "" if error.filename is None else f": {clean(os.fsdecode(error.filename))}"
    return DiskProblem(f"{rule} ({os.strerror(error.errno)}){where}", remedy)


def tells_of_disk(text: str) -> bool:
    """Whether a text, as kept of a search that has ended, is one of `disk_problem`."""
    return any(rule in text for rule, _ in REMEDIES.values())


def disk_lack(folder: Path) -> OSError | None:
    """The error with which a file of 64 kB in `folder` cannot be written just now; None if it can."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(65536))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return None


def free_bytes(folder: Path) -> int:
    """Bytes that we can still write where `folder` is; 0 where there is no more inode, or it cannot be asked."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return 0
    return 0 if found.f_files and not found.f_favail else found.f_bavail * found.f_frsize
