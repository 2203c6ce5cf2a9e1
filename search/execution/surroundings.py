"""What Ray's processes need of their environment: a short folder for sockets, a home that can be written, a user's name, open files.

Containers and batch systems give none of these: HOME is / or missing, the user has no entry in /etc/passwd, TMPDIR is long.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from paretune.common.errors import EnvironmentProblem

TEMP_PREFIX = "pt-"
# sun_path has 108 bytes, the last one zero. Below its folder Ray names a session by time and process id, then the socket.
SOCKET_BYTES = 107
BELOW = len("/pt-abcdefgh/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") + 4
# Ray puts the folder into command lines and patterns.
PLAIN = re.compile(r"[A-Za-z0-9/._-]+")
USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
# What points to other clusters and folders than the one that is started here.
FOREIGN = ("RAY_ADDRESS", "RAY_TMPDIR", "RAY_NAMESPACE", "RAY_RUNTIME_ENV_HOOK", "RAY_JOB_CONFIG_JSON_ENV_VAR")
OPEN_FILES = 4096


def session_folder() -> Path:
    """A new private folder that is short enough for Ray's sockets; the caller removes it. Raises EnvironmentProblem."""
    for folder in _places():
        with contextlib.suppress(OSError):
            return Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=folder))
    tried = ", ".join(map(str, _candidates()))
    raise EnvironmentProblem(
        f"Ray's sockets need a writable folder with a path of at most {SOCKET_BYTES - BELOW} bytes (letters, digits, '.', '_', '-'), "
        f"but there is none among {tried}",
        "make /tmp writable, or name a short folder with TMPDIR",
    )


def _places() -> Iterator[Path]:
    for folder in _candidates():
        if len(os.fsencode(folder)) <= SOCKET_BYTES - BELOW and PLAIN.fullmatch(str(folder)) and folder.is_dir():
            yield folder


def _candidates() -> list[Path]:
    """Where to look, best first: large and usual ones before those in memory."""
    named = (tempfile.gettempdir(), "/tmp", "/var/tmp", os.environ.get("XDG_RUNTIME_DIR"), "/dev/shm")
    return list(dict.fromkeys(Path(name).absolute() for name in named if name))


def prepare_environment(environment: MutableMapping[str, str], home: Path, local: bool = True) -> None:
    """Give this process and its children a HOME that can be written (below `home` where there is none) and a user's name, and let them
    open as many files as they may. For a `local` cluster, forget what names another one."""
    if not _is_writable_folder(environment.get("HOME", "")):
        own = home / "cache" / "home"
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment["HOME"] = str(own)
    if not any(environment.get(name) for name in USER_VARIABLES) and not _has_entry():
        environment["USER"] = f"uid{os.getuid()}"
    if local:
        for name in FOREIGN:
            environment.pop(name, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_writable_folder(name: str) -> bool:
    return bool(name) and Path(name).is_absolute() and os.access(name, os.W_OK | os.X_OK) and os.path.isdir(name)  # noqa: PTH112


def _has_entry() -> bool:
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def not_started(error: Exception, temp: Path) -> EnvironmentProblem:
    """What to tell of a Ray that does not start: its own reason, and the last words of its log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0][:300] if lines else type(error).__name__
    free = shutil.disk_usage(temp).free if temp.is_dir() else 0
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return EnvironmentProblem(
        f"Ray's processes could not be started: {reason}",
        f"they need free memory, disk below {temp.parent} ({free / 1e9:.1f} GB free), open files (ulimit -n is {soft}) and processes "
        "(ulimit -u); mend that, then run the same command again",
    )
