"""Files of artifacts by their digest: what a client sends is looked up among what the checksums list, and never becomes a path."""

from __future__ import annotations

from pathlib import Path

from paretune.common.checksums import CHECKSUMS, sha256
from paretune.search.study.view import StudyView
from paretune.service.api.models import File
from paretune.service.data import Studies
from paretune.service.queue.job import Unknown


def files_of(view: StudyView, key: str) -> list[File]:
    """The files that the artifact's checksums list. Raises Unknown if the candidate has none."""
    return [File(name=name, sha256=digest, bytes=path.stat().st_size) for digest, name, path in _listed(view, key)]


def find_file(studies: Studies, digest: str) -> tuple[Path, str]:
    """(path, name) of a file of some artifact with this SHA-256. Raises Unknown, also if its content is not what was vouched for."""
    for study in studies.names():
        folder = studies.folder / study / "artifacts"
        for sums in sorted(folder.glob(f"*/{CHECKSUMS}")):
            for line in sums.read_text("utf8", "replace").splitlines():
                known, _, name = line.partition("  ")
                if known == digest and (path := _inside(sums.parent, name)) is not None and sha256(path) == digest:
                    return path, Path(name).name
    raise Unknown("no artifact has a file with this digest", "look at the candidate's artifact")


def _listed(view: StudyView, key: str) -> list[tuple[str, str, Path]]:
    point = next((p for p in view.confirmed if p.key == key), None)
    folder = None if point is None else view.folder / "artifacts" / point.key
    if folder is None or not (folder / CHECKSUMS).is_file():
        raise Unknown("no confirmed candidate with an artifact has this key", "look at the study's candidates")
    found = []
    for line in (folder / CHECKSUMS).read_text("utf8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        if (path := _inside(folder, name)) is not None:
            found.append((digest, name, path))
    return found


def _inside(folder: Path, name: str) -> Path | None:
    """The file `name` of `folder`; None if it is not there or a link leads out."""
    path = folder / name
    if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
        return path
    return None
