"""Running the director's tasks in this process: one after the other, or simulated on a virtual clock with several workers."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paretune.search.evaluators.simulated import VirtualClock
from paretune.search.execution.signals import obeyed
from paretune.search.execution.trainable import make_evaluator
from paretune.search.execution.tune_search import OUTCOME, TASK, JointSearch
from paretune.search.layout import THREADS, Layout
from paretune.search.policy.director import Director
from paretune.search.tasks.base import Outcome, Task

Evaluate = Callable[[Task], Outcome[Any]]


def run_inline(director: Director, evaluate: Evaluate) -> None:
    """Ask, evaluate, tell in this process until the director is done."""
    searcher, number = JointSearch(director), 0
    while True:
        trial_id = f"inline-{number}"
        config = searcher.suggest(trial_id)
        if config is None:
            raise RuntimeError("the director waits, but nothing is running")
        if isinstance(config, str):
            return
        _finish(searcher, trial_id, config[TASK], evaluate)
        number += 1


def run_here(
    director: Director, folder: Path, home: Path, layout: Layout, launch: int, address: str | None = None
) -> None:
    """Run the study's tasks in this process, where a debugger sees them; SIGINT and SIGTERM end it after the present task."""
    os.environ[THREADS] = str(layout.threads)
    evaluator = make_evaluator(folder, home)
    try:
        with obeyed(director):
            run_inline(director, evaluator.run)
    finally:
        evaluator.close()


def run_workers(
    director: Director,
    evaluate: Evaluate,
    clock: VirtualClock,
    seconds_of: Callable[[Task], float],
    driver: Callable[[], float] = lambda: 0.0,
) -> None:
    """As `director.state.workers` workers would, on a virtual clock: a task takes `seconds_of` it, and what the driver does
    between tasks takes the difference of `driver()` before and after (time.perf_counter charges what it really takes)."""
    searcher, number, running = JointSearch(director), 0, list[tuple[float, int, str, Task]]()
    finished = False
    while True:
        before = driver()
        config = None if finished else searcher.suggest(f"simulated-{number}")
        clock.now += driver() - before
        if isinstance(config, dict):
            task = config[TASK]
            heapq.heappush(running, (clock.now + seconds_of(task), number, f"simulated-{number}", task))
            number += 1
            continue
        finished = finished or isinstance(config, str)
        if not running:
            if finished:
                return
            raise RuntimeError("the director waits, but nothing is running")
        end, _, trial_id, task = heapq.heappop(running)
        clock.now = max(clock.now, end)
        before = driver()
        _finish(searcher, trial_id, task, evaluate)
        clock.now += driver() - before


def _finish(searcher: JointSearch, trial_id: str, task: Task, evaluate: Evaluate) -> None:
    outcome: Outcome[Any] = Outcome(done=False)
    while not outcome.done:
        outcome = evaluate(task)
        if not outcome.done:
            searcher.on_trial_result(trial_id, {OUTCOME: outcome})
    searcher.on_trial_complete(trial_id, {OUTCOME: outcome})
