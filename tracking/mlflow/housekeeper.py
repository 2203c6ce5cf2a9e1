"""What happens after every confirmation: the report is rewritten and MLflow told, never at the search's expense."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from paretune.common.command_line import pasted
from paretune.common.errors import ParetuneError
from paretune.hardware_profiles.lock import MachineLock
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.tracking.mlflow.sink import try_drain
from paretune.tracking.report.report import write_report

LAST_PATIENCE_S = 60.0


class Housekeeper:
    """Writes the report and tells MLflow in a thread of its own, so that no worker waits for that. Both hold the machine lock
    shared, step by step, so that they never run beside a measurement. What MLflow did not take stays in the outbox."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store, self.home = store, home
        self.problem: str | None = None
        self._due, self._lock, self._writing = False, threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None

    def tidy(self) -> None:
        """Rewrite report.html and front.png and tell MLflow, soon; after the present round if there is one."""
        with self._lock:
            self._due = True
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._rounds, name="report and MLflow", daemon=True)
                self._thread.start()

    def finish(self, patience_s: float = LAST_PATIENCE_S) -> str | None:
        """The last report; returns what is left to sync, in words, or None."""
        deadline = time.monotonic() + patience_s
        self._wait(deadline)
        self._write_report()  # here, because it must be there, however long MLflow takes
        self.tidy()
        self._wait(max(deadline, time.monotonic() + 1.0))
        left = len(self.store.outbox()) if self.store.is_there else 0
        if not left:
            return None
        again = pasted("sync", self.store.folder.name, home=self.home)
        return f"{left} results are not in MLflow yet ({self.problem or 'it did not answer in time'}); run `{again}` when it is back"

    def _rounds(self) -> None:
        """Until nothing is due."""
        while True:
            with self._lock:
                if not self._due:
                    self._thread = None
                    return
                self._due = False
            try:
                with MachineLock().shared():
                    self._write_report()
                self._drain()
            except Exception as error:  # of a report or of MLflow: told at the end, never fatal
                self.problem = f"{type(error).__name__}: {error}"

    def _wait(self, deadline: float) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _write_report(self) -> None:
        if not self.store.is_there:
            return
        try:
            with self._writing:
                write_report(load_view(self.store))
        except OSError as error:  # a full disk must not end the search from here; the store will say so itself
            self.problem = f"the report could not be written: {error.strerror}"
        except ParetuneError as error:
            self.problem = f"the report could not be written: {error.problem}"

    def _drain(self) -> None:
        if not self.store.is_there:
            return
        try:
            self.problem = try_drain(self.home, self.store, load_view(self.store), MachineLock().shared)
        except ParetuneError as error:
            self.problem = error.problem
