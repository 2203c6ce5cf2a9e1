"""The command lines that are printed: one function makes them, so that every one of them can be pasted into a shell.

It quotes what a shell would take apart and names the home where the command would not find it by itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM = "paretune"
USUAL_HOME = "mlruns"
HOME_VARIABLE = "PARETUNE_HOME"
# Commands that know no --home.
WITHOUT_HOME = ("generate", "hardware check")
_now: dict[str, Path] = {}


def use_home(home: Path) -> Path:
    """Remember the home of this process, for messages of places that do not know it. Returns it."""
    _now["home"] = home.resolve()
    return home


def home_now() -> Path:
    """The home of this process."""
    return (_now.get("home") or usual_home()).resolve()


def usual_home() -> Path:
    """The home of a command without --home."""
    return Path(os.environ.get(HOME_VARIABLE) or USUAL_HOME).resolve()


def pasted(*words: object, home: Path | None = None, stored: bool = False) -> str:
    """A command line of ours such as `pasted("report", study)`, quoted for a POSIX shell.

    `home` is that of this process (`use_home`) if left out. `stored`: for a file that is read elsewhere and later, so the home is
    always said and the program is plainly `paretune`.
    """
    told = [str(word) for word in words]
    line = [shlex.quote(word) for word in told]
    if not " ".join(told).startswith(WITHOUT_HOME):
        line += home_words(home, stored)
    return " ".join([PROGRAM if stored else program(), *line])


def home_words(home: Path | None = None, stored: bool = False) -> list[str]:
    """`--home FOLDER`, quoted, or nothing where a command finds that home without it."""
    found = home_now() if home is None else home.resolve()
    return [] if found == usual_home() and not stored else ["--home", shlex.quote(str(found))]


def program() -> str:
    """How this shell would call us again, quoted."""
    called = Path(sys.argv[0] or PROGRAM)
    if shutil.which(PROGRAM):
        return PROGRAM
    if called.name == PROGRAM:
        return quoted(called.absolute())
    found = shutil.which("python")
    same = found is not None and Path(found).absolute() == Path(sys.executable).absolute()
    return f"{'python' if same else quoted(Path(sys.executable))} -m {PROGRAM}"


def quoted(path: Path) -> str:
    """A path as a word of a shell, short."""
    return shlex.quote(str(short(path)))


def short(path: Path) -> Path:
    """Relative to the working directory where it lies in it and is not taken for an option."""
    with contextlib.suppress(ValueError, OSError):
        found = path.relative_to(Path.cwd())
        return path if str(found).startswith("-") else found
    return path
