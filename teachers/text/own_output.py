"""What of a folder is somebody's text, and what is there because a program wrote it: our homes and artifacts, models, caches."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

from paretune.common.errors import UsageError

# A file that says that a folder is a home: studies, caches and the MLflow database, never text.
HOME_MARKER = ".paretune-home"
HOME_ENTRIES = {"studies", "cache", "artifacts", "profiles", "service", "agent", "README.md"}
ARTIFACT_FACTS = "paretune.json"
PROFILE_FILES = {"profile.json", "profile.html"}
OTHERS_FOLDERS = {"__pycache__", "node_modules", "site-packages", "mlruns", "mlartifacts"}
MODEL_NAMES = {"merges.txt", "vocab.txt", "added_tokens.txt", "license.txt", "notice.txt"}
MODEL_SUFFIXES = {".json", ".md", ".py"}


def mark_home(home: Path) -> None:
    """Make `home` recognisable wherever it lies or is moved to. A home that cannot be written is left as it is."""
    with contextlib.suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        marker = home / HOME_MARKER
        if not marker.exists():
            marker.write_text("A home of paretune: its files are output and never read as text.\n", "utf8")


def is_home(folder: Path) -> bool:
    """By its marker, or for homes older than that by what lies in it."""
    if (folder / HOME_MARKER).exists():
        return True
    studies = folder / "studies"
    return studies.is_dir() and any((study / "setup.json").exists() for study in _children(studies))


@dataclass
class Walked:
    """The files of a folder, sorted, and how often something was left out for which reason."""

    files: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def walk(root: Path) -> Walked:
    """All regular files below `root` that may be text. Folders behind links are not entered, so that no link can go in circles.

    Left out: hidden files and folders, homes, artifacts and profiles of this program, MLflow's folders, virtual environments, caches of
    Python and Node, and the files that a model's folder consists of. Raises UsageError for a folder that cannot be read.
    """
    found = Walked()
    for folder, folders, names in os.walk(root, onerror=_refuse):
        here = Path(folder)
        if here != root and (reason := _not_entered(here)):
            found.skipped[reason] += 1
            folders.clear()
            continue
        own = (HOME_ENTRIES if here == root and is_home(here) else set()) | (
            PROFILE_FILES if set(names) >= PROFILE_FILES else set()
        )
        model = is_model(here, names)
        for name in [name for name in folders if name in own]:
            folders.remove(name)
            found.skipped["output of this program"] += 1
        for name in list(folders):
            if name.startswith("."):
                folders.remove(name)
                found.skipped["hidden folder"] += 1
            elif (here / name).is_symlink():
                folders.remove(name)
                found.skipped["link to a folder"] += 1
        for name in names:
            reason = _not_read(here / name, own, model)
            if reason:
                found.skipped[reason] += 1
            else:
                found.files.append(here / name)
    found.files.sort()
    return found


def is_model(folder: Path, names: list[str]) -> bool:
    """Whether a Hugging Face model or its tokenizer lies in a folder with these files."""
    return "tokenizer.json" in names or (
        "config.json" in names and any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names)
    )


def _refuse(error: OSError) -> None:
    raise UsageError(
        f"the folder {error.filename} cannot be read: {error.strerror}", "check the permissions, or name another folder"
    ) from None


def _not_entered(folder: Path) -> str:
    if folder.name in OTHERS_FOLDERS:
        return f"folder {folder.name}"
    if is_home(folder) or (folder / ARTIFACT_FACTS).exists():
        return "output of this program"
    return "virtual environment" if (folder / "pyvenv.cfg").exists() else ""


def _not_read(file: Path, own: Set[str], model: bool) -> str:
    if file.name.startswith("."):
        return "hidden file"
    if file.name in own:
        return "output of this program"
    if model and (file.name.lower() in MODEL_NAMES or file.suffix.lower() in MODEL_SUFFIXES):
        return "file of a model"
    try:
        regular = file.is_file()
    except OSError:
        regular = False
    return "" if regular else "broken link, socket or device"


def _children(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from folder.iterdir()
