"""What keeps a file from being read, by its own name: permissions, a folder, a link that leads nowhere, a disk that fails.

A message that guesses ("copy it again") is only given for a file that could be read and is wrong.
"""

from __future__ import annotations

import errno
import os
import pwd
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from paretune.common.errors import EnvironmentProblem, ParetuneError, UsageError

REMEDIES: Final[Mapping[int, str]] = {
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.ELOOP: "mend the symbolic links: they lead to each other",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOENT: "check the path",
}
MOST_SHOWN = 200
# What the machine lacks; everything else is the path that the user gave.
MACHINE: Final[Mapping[int, str]] = {
    errno.EIO: "check the disk: the system could not read from it",
    errno.ESTALE: "mount the network disk again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "end other programs: the system has too many open files",
    errno.ENOMEM: "end other programs: the system is out of memory",
}


def unreadable(path: Path, error: OSError, what: str = "") -> ParetuneError:
    """Return the error to raise for a file or folder that cannot be read; `what` names it, as "the study's database".

    A UsageError where the path or its permissions are to be changed, an EnvironmentProblem where the machine is.
    """
    named = f"{what} {_told(path)}" if what else _told(path)
    if error.errno in (errno.EACCES, errno.EPERM):
        problem, remedy = _permission(path, "read")
        return UsageError(f"{named} cannot be read: {problem}", remedy)
    if error.errno == errno.ENOENT and path.is_symlink():
        reason = f"it is a symbolic link to {path.readlink()}, which does not exist"
        return UsageError(f"{named} cannot be read: {reason}", "bring that file back, or copy the file itself")
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in MACHINE:
        return EnvironmentProblem(f"{named} cannot be read: {reason}", MACHINE[error.errno or 0])
    return UsageError(f"{named} cannot be read: {reason}", REMEDIES.get(error.errno or 0, "check the path"))


def unwritable(path: Path, error: OSError, remedy: str, what: str = "") -> EnvironmentProblem:
    """Return the error to raise for a file or folder that cannot be written. `remedy` is always part of the advice."""
    named = f"{what} {_told(path)}" if what else _told(path)
    if error.errno in (errno.EACCES, errno.EPERM):
        problem, mend = _permission(path, "written")
        return EnvironmentProblem(f"{named} cannot be written: {problem}", f"{mend}; or {remedy}")
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return EnvironmentProblem(f"{named} cannot be written: a file is where a folder must be", remedy)
    return EnvironmentProblem(f"{named} cannot be written: {error.strerror or error}", remedy)


def path_problem(error: OSError) -> ParetuneError | None:
    """Return what to raise for an unexpected error that a path or the machine explains; None if it may be a bug."""
    if "usable temporary" in str(error):
        return EnvironmentProblem(
            error.strerror or str(error), "make /tmp writable, or name a folder that is with TMPDIR"
        )
    known = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, *MACHINE)
    if error.errno not in known or (error.filename is None and error.errno not in MACHINE):
        return None
    if error.filename is None:
        return EnvironmentProblem(error.strerror or str(error), MACHINE[error.errno or 0])
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else Path(str(error.filename))
    if error.errno in (errno.EACCES, errno.EPERM):
        problem, remedy = _permission(path, "used")
        return EnvironmentProblem(f"{_told(path)} cannot be used: {problem}", remedy)
    return unreadable(path, error)


def require_readable(path: Path) -> None:
    """Raises as `unreadable` if the regular file `path` cannot be opened for reading."""
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise unreadable(path, error) from None


def is_file(path: Path) -> bool:
    """Whether there is a regular file; False only where there is nothing or something else. Raises as `unreadable` where the system
    does not say, or a link leads nowhere."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path, what: str = "the folder") -> bool:
    """Whether there is a folder that can be listed; else as `is_file`."""
    mode = _mode(path, what)
    if mode is None or not stat.S_ISDIR(mode):
        return False
    try:
        with os.scandir(path):
            return True
    except OSError as error:
        raise unreadable(path, error, what) from None


def _mode(path: Path, what: str = "") -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise unreadable(path, error, what) from None
        return None
    except OSError as error:
        raise unreadable(path, error, what) from None


def _told(path: Path) -> str:
    text = str(path)
    return text if len(text) < MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def _permission(path: Path, verb: str) -> tuple[str, str]:
    """(the rule and the actual value, the remedy) of a refusal: the first folder on the way that may not be entered, else the path."""
    me = _name(os.geteuid())
    for folder in reversed(path.absolute().parents):
        if not os.access(folder, os.X_OK):
            problem = f"permission denied, user {me} may not enter {_owned(folder)}"
            return problem, f"let its owner run `chmod a+x {shlex.quote(str(folder))}`"
    target = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
    if verb == "used":
        return f"permission denied for user {me}: {_owned(target)}", f"give that user access to {target}"
    right = {"read": "r", "written": "w"}[verb] + ("x" if target.is_dir() else "")
    return (
        f"permission denied for user {me}: {_owned(target)}",
        f"let its owner run `chmod a+{right} {shlex.quote(str(target))}`",
    )


def _owned(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return str(path)
    return f"{path} belongs to {_name(found.st_uid)} and has mode {stat.S_IMODE(found.st_mode):04o}"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
