"""What a further target adds to a study: wall time of its predictions, of keeping them, and of what is drawn of them."""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from benchmarks.common import HOME, Figure, figure, latest_study
from paretune.hardware_profiles.profile import Profile, load_profile, profile_names
from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view
from paretune.search.targets.profiles import Predict, is_at_hand
from paretune.search.targets.targets import add_targets
from paretune.tracking.report.targets import targets_section

MOST_PROFILES = 8


def second_target_cost(predict: Predict | None = None) -> Iterator[Figure]:
    """Wall time that one further predicted profile adds to the latest study, as a share of its budget.

    On a copy of its database, whose quality stays as it is: predict all confirmed candidates, keep the rows, draw the
    report's section. Median over the profiles at hand by name, each added to a study that has no other.
    """
    view = latest_study()
    own = view.meta["profile"]["name"]
    profiles = [p for name in profile_names(HOME) if name != own and not is_at_hand(p := load_profile(name, HOME))]
    if not profiles:
        raise SystemExit(f"no profile but {own} in {HOME / 'profiles'}: put a YAML file there")
    seconds = [seconds_of(view, profile, predict) for profile in profiles[:MOST_PROFILES]]
    shares = [s / view.meta["budget_s"] for s in seconds]
    yield figure(
        "second_target_cost",
        statistics.median(shares),
        "share of the budget",
        min(shares),
        max(shares),
        seconds=statistics.median(seconds),
        candidates=len(view.confirmed),
        budget_s=view.meta["budget_s"],
        profiles=[p.name for p in profiles[:MOST_PROFILES]],
    )


def seconds_of(view: StudyView, profile: Profile, predict: Predict | None = None) -> float:
    """Seconds to add `profile` to a copy of the study from which all further targets are taken."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "studies" / view.study
        copy.mkdir(parents=True)
        with (
            closing(sqlite3.connect(view.folder / "study.db")) as source,
            closing(sqlite3.connect(copy / "study.db")) as to,
        ):
            source.backup(to)
        store = Store.open_study(copy)
        try:
            store.set_meta(targets=[])
            start = time.perf_counter()
            add_targets(store, Path(folder), [profile], 0.0, predict)
            targets_section(load_view(store))
            return time.perf_counter() - start
        finally:
            store.close()
