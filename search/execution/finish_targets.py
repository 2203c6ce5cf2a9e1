"""The last stage of a search with further targets: within what is left of the budget, never at the search's expense."""

from __future__ import annotations

import time
from pathlib import Path

from paretune.common.errors import ParetuneError
from paretune.search.budget import TAIL_S
from paretune.search.prepare.ready import Ready
from paretune.search.study.store import Store
from paretune.search.targets.targets import add_targets

STAGE = "further targets"


def finish_targets(store: Store, ready: Ready, home: Path) -> str | None:
    """Add the spec's further targets to a study whose search has ended; returns a problem in words instead of raising."""
    if not ready.targets or not store.evaluations("confirmed", "complete"):
        return None
    start, spent = time.monotonic(), float(store.meta("spent_s", 0.0) or 0.0)
    problem = None
    try:
        add_targets(store, home, ready.targets, ready.spec.budget_s - TAIL_S - spent)
    except ParetuneError as error:
        problem = f"the further targets have no costs: {error}"
        store.event("target", problem)
    seconds = time.monotonic() - start
    stages = dict(store.meta("seconds_by_stage", {}))
    stages[STAGE] = stages.get(STAGE, 0.0) + seconds
    store.set_meta(spent_s=spent + seconds, seconds_by_stage=stages)
    return problem
