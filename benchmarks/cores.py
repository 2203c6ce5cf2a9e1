"""Exploring on this machine's cores: one worker per core against one worker on all of them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, figure
from benchmarks.joint import prepare_cache, run_search
from benchmarks.studies import rung0_gaps
from paretune.search.study.store import Store
from paretune.search.study.view import load_view

# Nearly all of the time is for exploring; the elastic student and the latencies are there before.
SETTINGS = {"budget": "2m", "shares": {"elastic": 0.1, "explore": 0.8, "confirm": 0.02}, "fit_points": 30}
ROUNDS = 2


def cores() -> Iterator[Figure]:
    """Rung-0 candidates per minute with one one-thread worker per core, over those with one worker on all cores; the layouts take
    turns, and the median of their ratios counts."""
    here = len(os.sched_getaffinity(0))
    layouts: dict[str, dict[str, int]] = {
        "one": {"workers": 1, "threads_per_trial": here},
        "many": {"workers": here, "threads_per_trial": 1},
    }
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        prepare_cache(prepared, SETTINGS)
        for number in range(ROUNDS):
            for name in list(layouts)[:: 1 if number % 2 == 0 else -1]:
                rates[name].append(rate_of(Path(folder) / f"{name}{number}", prepared, layouts[name]))
    ratios = [many / one for many, one in zip(rates["many"], rates["one"], strict=True)]
    yield figure(
        "cores",
        statistics.median(ratios),
        "ratio",
        min(ratios),
        max(ratios),
        cores=here,
        per_minute=rates,
        rounds=ROUNDS,
    )


def rate_of(home: Path, prepared: Path, layout: dict[str, Any]) -> float:
    """Rung-0 candidates per minute of wall time of a search with this layout."""
    home.mkdir()
    shutil.copytree(prepared / "cache", home / "cache")
    (home / "spec.yaml").write_text(json.dumps({**SETTINGS, **layout}), encoding="utf-8")
    run_search(home / "spec.yaml", home, "cores")
    store = Store.reader(home / "studies" / "cores")
    gaps = rung0_gaps(load_view(store))
    store.close()
    shutil.rmtree(home)
    return 60 / statistics.mean(gaps)
