"""What happens after every confirmation: the report is rewritten and MLflow told, never at the search's expense."""

from __future__ import annotations

import threading
from pathlib import Path

from paretune.common.command_line import pasted
from paretune.hardware_profiles.lock import MachineLock
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.tracking.mlflow.sink import try_drain
from paretune.tracking.report.report import write_report

PATIENCE_S = 3.0


class Housekeeper:
    """Report in the caller's thread (a worker waits meanwhile, so nothing competes with it); MLflow in a thread of its own
    that the search waits for only a few seconds and that lets measurements in between any two steps. What MLflow did not take
    stays in the outbox."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store, self.home = store, home
        self.problem: str | None = None
        self._thread: threading.Thread | None = None

    def tidy(self, patience_s: float = PATIENCE_S) -> None:
        """Rewrite report.html and front.png, and start telling MLflow unless it is still being told."""
        if not self.store.is_there:
            return
        try:
            write_report(load_view(self.store))
        except OSError as error:  # a full disk must not end the search from here; the store will say so itself
            self.problem = f"the report could not be written: {error.strerror}"
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._drain, daemon=True)
            self._thread.start()
        self._thread.join(patience_s)

    def finish(self, patience_s: float = 60.0) -> str | None:
        """The last report; returns what is left to sync, in words, or None."""
        if self._thread is not None:
            self._thread.join(patience_s)
        self.tidy(patience_s)
        left = len(self.store.outbox()) if self.store.is_there else 0
        if not left:
            return None
        again = pasted("sync", self.store.folder.name, home=self.home)
        return f"{left} results are not in MLflow yet ({self.problem or 'it did not answer in time'}); run `{again}` when it is back"

    def _drain(self) -> None:
        self.problem = try_drain(self.home, self.store, load_view(self.store), MachineLock().shared)
