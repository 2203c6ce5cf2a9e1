"""Studies for many readers at once: views of the stores, read again only when a store has changed, never written."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.hardware_profiles.errors import ParetuneError
from paretune.search.database import is_taken
from paretune.search.store import Store
from paretune.search.studies import STUDY_NAME
from paretune.search.view import StudyView, load_view, standing
from paretune.service.job import Unknown

# A view of a running search is read again at most so often, and never longer than this part of the time: reading 10,000
# candidates takes seconds that the search itself would miss.
LEAST_AGE_S, READING_SHARE = 1.0, 0.1
MOST_KEPT = 32


@dataclass
class _Kept:
    stamp: tuple[Any, ...]
    view: StudyView
    read_at: float
    seconds: float


class Studies:
    """The studies of a home. Thread-safe."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "studies"
        self._kept: dict[str, _Kept] = {}
        self._told: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Ids of all studies, the one written last first."""
        found = []
        for path in self.folder.glob("*/study.db"):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path.parent.name))
        return [name for _, name in sorted(found, reverse=True)]

    def view(self, study: str) -> StudyView:
        """Raises Unknown if there is no study of that name, EnvironmentProblem or UsageError if it cannot be read."""
        folder = self.known(study)
        with self._lock:
            lock = self._locks.setdefault(study, threading.Lock())
        with lock:
            kept, stamp = self._kept.get(study), stamp_of(folder)
            if kept is not None:
                age = time.monotonic() - kept.read_at
                if kept.stamp == stamp or age < max(LEAST_AGE_S, kept.seconds / READING_SHARE):
                    return kept.view
            start = time.monotonic()
            store = Store.reader(folder)
            try:
                view = load_view(store)
            finally:
                store.close()
            end = time.monotonic()
            self._kept[study] = _Kept(stamp, view, end, end - start)
            self._forget()
            return view

    def known(self, study: str) -> Path:
        """The study's folder. Raises Unknown."""
        if STUDY_NAME.match(study):
            folder = self.folder / study
            if (folder / "study.db").is_file():
                return folder
        raise Unknown("no study has this name", "look at /v1/studies")

    def summaries(self) -> list[dict[str, Any]]:
        """How every study stands, the one written last first; one that cannot be read is listed with its problem."""
        return [self._summary(name) for name in self.names()]

    def _summary(self, name: str) -> dict[str, Any]:
        """Kept apart from the views, of which only some are: a home may have hundreds of studies that do not change."""
        try:
            stamp = stamp_of(self.known(name))
            kept = self._told.get(name)
            if kept is None or kept[0] != stamp:
                kept = self._told[name] = (stamp, summary(self.view(name)))
            return kept[1]
        except ParetuneError as error:
            return {"study": name, "state": "unreadable", "problem": error.problem}

    def _forget(self) -> None:
        with self._lock:
            while len(self._kept) > MOST_KEPT:
                del self._kept[min(self._kept, key=lambda name: self._kept[name].read_at)]


def stamp_of(folder: Path) -> tuple[Any, ...]:
    """Changes whenever the store does, or when a search begins or ends to run on it."""
    found: list[Any] = [is_taken(folder)]
    for name in ("study.db", "study.db-wal"):
        with contextlib.suppress(OSError):
            stat = (folder / name).stat()
            if stat.st_size:  # a reader leaves an empty log behind for a moment
                found.append((name, stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def summary(view: StudyView) -> dict[str, Any]:
    """How a study stands, without its points."""
    meta = view.meta
    return {
        "study": view.study,
        "state": meta["state"],
        "stage": meta["stage"],
        "created": meta["created"],
        "teacher": (meta["teacher"] or {}).get("name"),
        "profile": (meta["profile"] or {}).get("name"),
        "targets": [t.name for t in view.targets],
        "objectives": list(view.objectives),
        **standing(view),
    }
