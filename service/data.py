"""Studies for many readers at once: views of the stores, read again only when a store has changed, never written."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from paretune.common.errors import ParetuneError
from paretune.search.prepare.studies import STUDY_NAME
from paretune.search.study.database import is_taken
from paretune.search.study.store import Store
from paretune.search.study.summary import Standing, load_standing
from paretune.search.study.view import StudyView, load_view
from paretune.service.printable import printable
from paretune.service.queue.job import Unknown

# A view of a running search is read again at most so often, and never longer than this part of the time: reading 10,000
# candidates takes seconds that the search itself would miss.
LEAST_AGE_S, READING_SHARE = 1.0, 0.1
MOST_KEPT = 32
T = TypeVar("T")
MISNAMED = "a study's folder has a name of letters, digits, '.', '_' and '-' only; rename it to see the study"


@dataclass
class _Kept(Generic[T]):
    stamp: tuple[Any, ...]
    value: T
    read_at: float
    seconds: float

    def serves(self, stamp: tuple[Any, ...]) -> bool:
        """Whether it need not be read again."""
        age = time.monotonic() - self.read_at
        return self.stamp == stamp or age < max(LEAST_AGE_S, self.seconds / READING_SHARE)


class Studies:
    """The studies of a home. Thread-safe."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "studies"
        self._views: dict[str, _Kept[StudyView]] = {}
        self._standings: dict[str, _Kept[Standing]] = {}
        self._locks: dict[tuple[str, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Ids of all studies, the one written last first."""
        return [name for _, name in self.moments() if STUDY_NAME.match(name)]

    def moments(self) -> list[tuple[float, str]]:
        """(seconds since 1970 of the last change, name of the folder) of every study, the newest first; no store is opened. A
        name may be no id of a study, and no Unicode either: see `summary`."""
        found = []
        for path in self.folder.glob("*/study.db"):
            with contextlib.suppress(OSError):
                found.append((_changed(path), path.parent.name))
        return sorted(found, reverse=True)

    def view(self, study: str) -> StudyView:
        """Raises Unknown if there is no study of that name, EnvironmentProblem or UsageError if it cannot be read."""
        folder = self.known(study)
        with self._lock_of("view", study):
            kept, stamp = self._views.get(study), stamp_of(folder)
            if kept is None or not kept.serves(stamp):
                start = time.monotonic()
                with contextlib.closing(Store.reader(folder)) as store:
                    view = load_view(store)
                end = time.monotonic()
                kept = self._views[study] = _Kept(stamp, view, end, end - start)
                self._forget()
            return kept.value

    def standing(self, study: str) -> Standing:
        """How a study stands and its last events, without its points: a few milliseconds. Raises as `view`.

        Kept apart from the views, of which only some are: a home may have thousands of studies that do not change.
        """
        folder = self.known(study)
        with self._lock_of("standing", study):
            kept, stamp = self._standings.get(study), stamp_of(folder)
            if kept is None or not kept.serves(stamp):
                start = time.monotonic()
                with contextlib.closing(Store.reader(folder)) as store:
                    found = load_standing(store)
                end = time.monotonic()
                kept = self._standings[study] = _Kept(stamp, found, end, end - start)
            return kept.value

    def summary(self, name: str) -> dict[str, Any]:
        """How the study in the folder `name` stands; one that cannot be read, or is no id, has its `problem` instead."""
        if not STUDY_NAME.match(name):
            return {"study": printable(name), "state": "unreadable", "problem": MISNAMED}
        try:
            return self.standing(name).told
        except ParetuneError as error:
            return {"study": name, "state": "unreadable", "problem": error.problem}

    def known(self, study: str) -> Path:
        """The study's folder. Raises Unknown."""
        if STUDY_NAME.match(study):
            folder = self.folder / study
            if (folder / "study.db").is_file():
                return folder
        raise Unknown("no study has this name", "look at /v1/studies")

    def _lock_of(self, kind: str, study: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault((kind, study), threading.Lock())

    def _forget(self) -> None:
        with self._lock:
            while len(self._views) > MOST_KEPT:
                del self._views[min(self._views, key=lambda name: self._views[name].read_at)]


def stamp_of(folder: Path) -> tuple[Any, ...]:
    """Changes whenever the store does, or when a search begins or ends to run on it."""
    found: list[Any] = [is_taken(folder)]
    for name in ("study.db", "study.db-wal"):
        with contextlib.suppress(OSError):
            stat = (folder / name).stat()
            if stat.st_size:  # a reader leaves an empty log behind for a moment
                found.append((name, stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def _changed(path: Path) -> float:
    """When a store was written last: its log is ahead of the file while a search runs."""
    moment = path.stat().st_mtime
    with contextlib.suppress(OSError):
        log = path.with_name("study.db-wal").stat()
        if log.st_size:
            moment = max(moment, log.st_mtime)
    return moment
