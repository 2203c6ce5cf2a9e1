"""What a client may name in a search's settings: built-in things, and files that the operator has put into the home.

    teacher    stdlib-coder, or a folder of <home>/models
    data       a file or folder of <home>/data
    profile    a profile's name (built in, or <home>/profiles/NAME.yaml)

Names, never paths: what a client says is compared with what is there and never becomes part of a path by itself. Plug-ins are code
and are named on the command line only. A link that leads out of its folder is not followed: whoever can make one there could
offer any file of the machine. A name that is no UTF-8 could not be sent back. Both are said (`not_offered`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.common.errors import UsageError
from paretune.hardware_profiles.profile import profile_names
from paretune.service.printable import is_printable, printable

EMBEDDED = "stdlib-coder"
FOLDERS = {"teacher": "models", "data": "data"}
LINKED = "links that lead out of the folder are not followed; the operator moves, copies or bind-mounts it there"
NOTHING: Mapping[str, str] = {}


@dataclass(frozen=True)
class Folder:
    """What a folder of the home has: `offered` names, and (name as it can be shown, reason) of the others."""

    offered: list[str]
    others: list[tuple[str, str]]


def choices(home: Path) -> dict[str, list[str]]:
    """What may be named, by setting."""
    return {
        "teacher": [EMBEDDED, *_look(home / "models").offered],
        "data": _look(home / "data").offered,
        "profile": known_profiles(home),
    }


def not_offered(home: Path) -> list[str]:
    """What lies in the home's folders and cannot be named, each with its reason."""
    return [f"{folder}/{name}: {reason}" for folder in FOLDERS.values() for name, reason in _look(home / folder).others]


def known_profiles(home: Path) -> list[str]:
    """Names of the target machines that can be sent."""
    return [name for name in profile_names(home) if is_printable(name)]


def resolved(settings: dict[str, Any], home: Path) -> dict[str, Any]:
    """The settings with names turned into the paths that a search takes. Raises UsageError for an unknown one."""
    known, found = choices(home), dict(settings)
    for key, folder in FOLDERS.items():
        value = found.get(key)
        if value is not None and not (key == "teacher" and value == EMBEDDED):
            others = dict(_look(home / folder).others)
            found[key] = str((home / folder / _one_of(key, value, known[key], others)).resolve())
    if "profile" in found:
        found["profile"] = _one_of("profile", found["profile"], known["profile"])
    targets = found.get("targets")
    if isinstance(targets, list):
        found["targets"] = [_one_of("targets", name, known["profile"]) for name in targets]
    return found


def _one_of(key: str, value: Any, known: list[str], others: Mapping[str, str] = NOTHING) -> str:
    if isinstance(value, str) and value in known:
        return value
    if isinstance(value, str) and value in others:
        raise UsageError(f"{key} must name something that this service offers, but {value!r} is not", others[value])
    near = difflib.get_close_matches(value, known, 1) if isinstance(value, str) else []
    told = (
        f"did you mean {near[0]}?"
        if near
        else f"there are: {', '.join(known) or 'none; the operator adds them to the home'}"
    )
    raise UsageError(f"{key} must name something that this service has, but got {str(value)[:100]!r}", told)


def _look(folder: Path) -> Folder:
    """What a folder of the home has, without hidden files. A folder that cannot be read offers nothing and says so."""
    offered, others = [], []
    try:
        root = folder.resolve()
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            reason = _why_not(path, root)
            if reason is None:
                offered.append(path.name)
            else:
                others.append((printable(path.name), reason))
    except FileNotFoundError:
        pass
    except OSError as error:
        others.append(("", f"the folder cannot be read: {error.strerror}"))
    return Folder(offered, others)


def _why_not(path: Path, root: Path) -> str | None:
    if not is_printable(path.name):
        return "the name is no UTF-8; the operator renames it"
    try:
        inside = path.resolve(strict=True).is_relative_to(root)
    except OSError as error:
        return f"it cannot be opened: {error.strerror}"
    return None if inside else LINKED
