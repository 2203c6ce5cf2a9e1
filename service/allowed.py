"""What a client may name in a search's settings: built-in things, and files that the operator has put into the home.

    teacher    stdlib-coder, or a folder of <home>/models
    data       a file or folder of <home>/data
    profile    a profile's name (built in, or <home>/profiles/NAME.yaml)

Names, never paths: what a client says is compared with what is there and never becomes part of a path by itself. Plug-ins are code
and are named on the command line only.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from paretune.hardware_profiles.errors import UsageError
from paretune.hardware_profiles.profile import profile_names

EMBEDDED = "stdlib-coder"


def choices(home: Path) -> dict[str, list[str]]:
    """What may be named, by setting."""
    return {
        "teacher": [EMBEDDED, *_names(home / "models")],
        "data": _names(home / "data"),
        "profile": profile_names(home),
    }


def resolved(settings: dict[str, Any], home: Path) -> dict[str, Any]:
    """The settings with names turned into the paths that a search takes. Raises UsageError for an unknown one."""
    known, found = choices(home), dict(settings)
    for key, folder in (("teacher", "models"), ("data", "data")):
        value = found.get(key)
        if value is not None and not (key == "teacher" and value == EMBEDDED):
            found[key] = str((home / folder / _one_of(key, value, known[key])).resolve())
    if "profile" in found:
        found["profile"] = _one_of("profile", found["profile"], known["profile"])
    targets = found.get("targets")
    if isinstance(targets, list):
        found["targets"] = [_one_of("targets", name, known["profile"]) for name in targets]
    return found


def _one_of(key: str, value: Any, known: list[str]) -> str:
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
    told = (
        f"did you mean {near[0]}?"
        if near
        else f"there are: {', '.join(known) or 'none; the operator adds them to the home'}"
    )
    raise UsageError(f"{key} must name something that this service has, but got {str(value)[:100]!r}", told)


def _names(folder: Path) -> list[str]:
    """Names in a folder of the home, without hidden ones and links that lead out of it."""
    if not folder.is_dir():
        return []
    root = folder.resolve()
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.resolve().is_relative_to(root))
