"""A study from its start or resumption to its end: run it, say how it ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from paretune.search.budget import Budget
from paretune.search.estimation.ledger import MAX_ATTEMPTS
from paretune.search.estimation.state import SearchState
from paretune.search.execution.ray_executor import run_ray
from paretune.search.layout import Layout
from paretune.search.policy.director import Director
from paretune.search.prepare.ready import Ready
from paretune.search.study.control import STATE_AFTER, withdraw
from paretune.search.study.database import folder_gone
from paretune.search.study.records import now
from paretune.search.study.store import Store

BEAT_S = 5.0
EXECUTOR = "PARETUNE_EXECUTOR"


def run_study(
    store: Store,
    ready: Ready,
    home: Path,
    notify: Callable[[str, dict[str, Any]], None],
    address: str | None = None,
    execute: Callable[..., None] | None = None,
) -> int:
    """Run a created or reopened study to its end; returns the exit code (0, 3, 4, 130). Starting is recovering, and takes back
    what was ordered before. `execute` runs the director's tasks; by default Ray does, or with PARETUNE_EXECUTOR=inline this process."""
    withdraw(store.folder)
    launches = int(store.meta("launches", 0)) + 1
    lost = store.recover(MAX_ATTEMPTS)
    budget = Budget(ready.search_s, float(store.meta("spent_s", 0.0) or 0.0), dict(store.meta("seconds_by_stage", {})))
    store.set_meta(
        launches=launches,
        state="running",
        stage="starting",
        pid=os.getpid(),
        spent_s=budget.spent_s,
        spent_at=[budget.spent_s, now()],
        doing=[],
    )
    store.event(
        "launch", f"launch {launches}" + (f", {lost} evaluations of a dead process are due again" if lost else "")
    )
    layout, execute = ready.layout(address), execute or _executor()
    if execute is not run_ray:  # one task after the other
        layout = Layout(1, layout.cores)
    state = SearchState(store, ready.spec, ready.space, budget, notify, layout.workers, layout.threads)
    director = Director(state)
    try:
        with time_kept(store, budget):
            execute(director, store.folder, home, layout, launches, address)
    except BaseException as error:
        if not store.is_there:
            raise folder_gone(store.folder) from error
        with contextlib.suppress(Exception):  # a full disk must not hide what happened
            store.set_meta(state="interrupted", spent_s=budget.elapsed_s, seconds_by_stage=budget.stages, doing=[])
        raise
    if not store.is_there:
        raise folder_gone(store.folder)
    if director.is_interrupted:
        store.withdraw()
    code = _ending(director, store)
    finished = code in (0, 3)  # everything else can be mended, and the same command goes on
    obeyed = None if director.obeyed is None else STATE_AFTER[director.obeyed]
    store.set_meta(
        state=obeyed or ("complete" if finished else "interrupted"),
        spent_s=budget.elapsed_s,
        seconds_by_stage=budget.stages,
        doing=[],
        exit_code=code,
        ended=director.state.stop_reason,
        remedy=director.state.remedy,
    )
    if budget.over:
        store.event("budget", f"{budget.over}: the last work, or the machine, took longer than expected")
    store.event("end", f"{director.state.stop_reason} (exit code {code})")
    withdraw(store.folder)
    if code != 130 or obeyed == "cancelled":
        shutil.rmtree(store.folder / "work", ignore_errors=True)
    return code


def _executor() -> Callable[..., None]:
    if os.environ.get(EXECUTOR) != "inline":
        return run_ray
    from paretune.search.execution.inline import run_here

    return run_here


@contextlib.contextmanager
def time_kept(store: Store, budget: Budget, every_s: float = BEAT_S) -> Iterator[None]:
    """Write the time used to the store every `every_s` seconds, so that a killed search's time counts as well."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(every_s):
            with contextlib.suppress(Exception):  # a full disk is told by who needs to write
                spent = budget.elapsed_s
                store.set_meta(spent_s=spent, spent_at=[spent, now()])

    thread = threading.Thread(target=keep, name="time used", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _ending(director: Director, store: Store) -> int:
    if director.state.exit_code:
        return director.state.exit_code
    if not store.evaluations("confirmed", "complete"):
        return 4
    baselines = {row.key for row in store.candidates() if row.source == "baseline"}
    return 0 if any(e.key not in baselines for e in store.evaluations("confirmed", "complete")) else 3
