"""What all benchmarks share: where studies live, what a figure looks like, the search as a process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
HOME = Path(os.environ.get("PARETUNE_HOME", "mlruns")).resolve()
Figure = dict[str, Any]
Benchmark = Callable[[], Iterator[Figure]]


def latest_study() -> StudyView:
    """The newest complete study of the home."""
    for path in sorted((HOME / "studies").glob("*/study.db"), key=lambda p: p.stat().st_mtime, reverse=True):
        store = Store.reader(path.parent)
        if (
            store.meta("state") == "complete"
            and store.meta("teacher")["name"] == "stdlib-coder"
            and store.evaluations("recovered", "complete")
        ):
            view = load_view(store)
            store.close()
            return view
        store.close()
    sys.exit(f"no complete study in {HOME}: run `make demo` first")


def figure(
    name: str, value: float, unit: str, low: float | None = None, high: float | None = None, **more: Any
) -> Figure:
    return {"name": name, "value": value, "unit": unit, "spread": None if low is None else [low, high], **more}


def search_command(*arguments: object) -> list[str]:
    """`paretune search` with this interpreter."""
    return [sys.executable, "-m", "paretune", "search", *map(str, arguments)]
