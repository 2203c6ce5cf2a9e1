"""Searches with several tasks in flight, on the simulated evaluator's virtual clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.hardware_profiles.profile import Profile, detected_profile
from paretune.search.budget import Budget
from paretune.search.estimation.state import SearchState
from paretune.search.evaluators.simulated import SECONDS, SHAPE, SimulatedEvaluator, VirtualClock
from paretune.search.execution.inline import run_workers
from paretune.search.execution.ray_executor import require_cpus
from paretune.search.execution.run import run_study
from paretune.search.execution.tune_search import OUTCOME, TASK, JointSearch
from paretune.search.layout import Layout, layout_of
from paretune.search.policy.director import Director
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.spec import Spec
from paretune.search.study.control import order
from paretune.search.study.store import Store
from paretune.search.study.summary import load_standing
from paretune.search.study.view import load_view, standing
from paretune.search.tasks.base import Outcome, Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.elastic import Elastic
from paretune.search.tasks.explore import Explore
from paretune.spaces.candidate import Candidate
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import load_teacher
from support.plans import empty_plan

WORKERS = 4


def make_ready(**options: Any) -> Ready:
    spec = Spec.model_validate({"budget": "150s", "fit_points": 30, "max_candidates": 130, "finalists": 3, **options})
    profile = detected_profile()
    space = Space.of(SHAPE, profile.weight_formats)
    return Ready(spec, load_teacher("stdlib-coder"), profile, space, empty_plan(space, spec))


def director_of(ready: Ready, store: Store, clock: Callable[[], float], workers: int = WORKERS) -> Director:
    return Director(
        SearchState(store, ready.spec, ready.space, Budget(ready.spec.budget_s, clock=clock), workers=workers)
    )


class Watch:
    """A search by `workers`, and for every moment at which a task ended what was in flight."""

    def __init__(self, ready: Ready, home: Path, workers: int = WORKERS) -> None:
        self.store = create_study(ready, home, "s", "x")
        self.clock = VirtualClock()
        self.director = director_of(ready, self.store, self.clock, workers)
        self.evaluator = SimulatedEvaluator(self.store.folder, home)
        self.flights: list[list[Task]] = []
        self.done: Counter[str] = Counter()

    def run(self) -> Watch:
        run_workers(self.director, self.evaluate, self.clock, lambda task: SECONDS[task.kind])
        return self

    def evaluate(self, task: Task) -> Outcome[Any]:
        self.flights.append(list(self.director.out.values()))
        self.done[task.kind] += 1
        return self.evaluator.run(task)


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return Watch(make_ready(), tmp_path_factory.mktemp("home")).run()


def test_all_workers_are_used_and_the_target_times_one_candidate_at_a_time(watch: Watch) -> None:
    assert max(len(flight) for flight in watch.flights) == WORKERS
    assert max(sum(task.is_timed for task in flight) for flight in watch.flights) == 1
    assert all(len({task.name for task in flight}) == len(flight) for flight in watch.flights)


def test_nothing_is_done_twice_and_the_budget_is_kept(watch: Watch) -> None:
    assert set(Counter((e.key, e.fidelity) for e in watch.store.evaluations()).values()) == {1}
    assert {e.status for e in watch.store.evaluations()} == {"complete"}
    assert watch.clock.now <= 150.0 and watch.director.out == {}
    assert watch.done["fit"] == watch.done["elastic"] == 1


def test_more_workers_explore_and_confirm_more(watch: Watch, tmp_path: Path) -> None:
    alone = Watch(make_ready(), tmp_path, workers=1).run()
    assert max(len(flight) for flight in alone.flights) == 1
    assert watch.done["rung0"] > 2.5 * alone.done["rung0"]
    assert watch.done["confirm"] > alone.done["confirm"]


def test_the_elastic_student_holds_up_only_who_needs_it(watch: Watch) -> None:
    """Baselines and the fit are measured meanwhile, and candidates of the teacher's size are explored."""
    during = [flight for flight in watch.flights if any(isinstance(task, Elastic) for task in flight)]
    assert {task.kind for flight in during for task in flight} >= {"confirm", "fit"}


def test_candidates_of_the_teachers_size_are_explored_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECONDS, "elastic", 100.0)
    watch = Watch(make_ready(), tmp_path).run()
    explored = [
        task.candidate
        for flight in watch.flights
        if any(isinstance(task, Elastic) for task in flight)
        for task in flight
        if isinstance(task, Explore)
    ]
    assert len(set(explored)) > 5
    assert all(isinstance(c, Candidate) and c.is_full_size(SHAPE) for c in explored)
    assert not any(e.kind == "exhausted" for e in watch.store.events())


def test_a_sampler_that_finds_nothing_of_the_teachers_size_is_not_asked_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray asks hundreds of times a second while a worker is free."""
    monkeypatch.setitem(SECONDS, "elastic", 100.0)
    ready, clock = make_ready(), VirtualClock()
    store = create_study(ready, tmp_path, "s", "x")
    searcher, evaluator = JointSearch(director_of(ready, store, clock)), SimulatedEvaluator(store.folder, tmp_path)
    register = searcher.director.register
    monkeypatch.setattr(
        searcher.director,
        "register",
        lambda candidate, source, params, **meta: (
            None if source == "sampler" else register(candidate, source, params, **meta)
        ),
    )
    asked = Counter[str]()
    monkeypatch.setattr(searcher, "_ask", lambda fixed: asked.update(ask=1) or JointSearch._ask(searcher, fixed))
    waits = 0
    for number in range(60):
        config = searcher.suggest(str(number))
        if config is None:
            waits += 1
            continue
        if not isinstance(config[TASK], Elastic):
            searcher.on_trial_complete(str(number), {OUTCOME: evaluator.run(config[TASK])})
    assert waits > 20 and asked["ask"] == 2


def test_proposals_in_flight_are_running_trials_of_every_study(tmp_path: Path) -> None:
    """Also of one that is rebuilt while they are in flight."""
    ready, clock = make_ready(), VirtualClock()
    store = create_study(ready, tmp_path, "s", "x")
    searcher, evaluator = JointSearch(director_of(ready, store, clock)), SimulatedEvaluator(store.folder, tmp_path)
    running: dict[str, Task] = {}
    checked = 0
    for number in range(150):
        config = searcher.suggest(str(number))
        clock.now += 0.1
        if isinstance(config, dict):
            running[str(number)] = config[TASK]
        exploring = [task.candidate.key for task in running.values() if isinstance(task, Explore)]
        proposed = [f.task for f in searcher._flights.values() if f.trial is not None]
        if proposed and searcher._built == searcher.estimates.version:
            states = Counter(trial.state for trial in searcher._ot_study.trials)
            assert states[TrialState.RUNNING] == len(proposed) <= len(exploring)
            checked += 1
        if len(running) == WORKERS or (config is None and running):
            trial_id = next(iter(running))
            outcome = evaluator.run(running.pop(trial_id))
            searcher.on_trial_complete(trial_id, {OUTCOME: outcome})
    assert checked > 20
    states = Counter(trial.state for trial in searcher._ot_study.trials)
    assert states[TrialState.RUNNING] <= WORKERS


def test_a_dead_worker_costs_its_own_task_only(tmp_path: Path) -> None:
    ready, clock = make_ready(max_candidates=60, budget="300s"), VirtualClock()
    store = create_study(ready, tmp_path, "s", "x")
    searcher, evaluator = JointSearch(director_of(ready, store, clock)), SimulatedEvaluator(store.folder, tmp_path)
    deaths: Counter[str] = Counter()
    victim = ""
    running: dict[str, Task] = {}
    number = 0
    while True:
        config = searcher.suggest(str(number)) if len(running) < WORKERS else None
        if isinstance(config, dict):
            running[str(number)] = task = config[TASK]
            victim = victim or (task.candidate.key if isinstance(task, Explore) else "")
            number += 1
            continue
        if not running:
            break
        trial_id = next(iter(running))
        task = running.pop(trial_id)
        clock.now += SECONDS[task.kind] / WORKERS
        dies = isinstance(task, Explore) and task.candidate.key == victim
        deaths[task.name] += dies
        result = None if dies else {OUTCOME: evaluator.run(task)}
        searcher.on_trial_complete(trial_id, result, error=dies)
    assert sum(deaths.values()) == 3
    (lost,) = [e for e in store.evaluations() if e.status == "failed"]
    assert lost.key == victim and "worker died" in lost.reason
    assert len(store.evaluations("rung0", "complete")) >= 50
    assert load_view(store).front


def test_a_study_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    ready = make_ready(max_candidates=60, budget="300s")
    store = create_study(ready, tmp_path, "s", "x")
    clock, evaluator = VirtualClock(), SimulatedEvaluator(store.folder, tmp_path)
    left = [50]

    def execute(director: Director, *_: Any) -> None:
        director.state.budget.clock = clock
        director.state.budget.__post_init__()

        def evaluate(task: Task) -> Outcome[Any]:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return evaluator.run(task)

        director.state.workers = director.state.costs.workers = WORKERS if left[0] > 0 else 1
        run_workers(director, evaluate, clock, lambda task: SECONDS[task.kind])

    with pytest.raises(KeyboardInterrupt):
        run_study(store, ready, tmp_path, lambda *_: None, None, execute)
    running = [e for e in store.evaluations() if e.status == "running"]
    assert 1 < len(running) <= WORKERS, "several tasks were in flight"
    assert run_study(store, ready, tmp_path, lambda *_: None, None, execute) == 0
    done = Counter((e.key, e.fidelity) for e in store.evaluations() if e.status == "complete")
    assert set(done.values()) == {1} and {(e.key, e.fidelity) for e in running} <= set(done)


def test_readers_see_what_each_worker_does(tmp_path: Path) -> None:
    ready, clock = make_ready(), VirtualClock()
    store = create_study(ready, tmp_path, "s", "x")
    searcher, evaluator = JointSearch(director_of(ready, store, clock)), SimulatedEvaluator(store.folder, tmp_path)
    first, second = searcher.suggest("a"), searcher.suggest("b")
    assert isinstance(first, dict) and isinstance(second, dict)
    store.set_meta(state="running")
    told = standing(load_view(store))["doing"]
    assert [task["stage"] for task in told] == ["baselines", "elastic student"] and "fp32" in told[0]["candidate"]
    assert load_standing(store).told["doing"] == told
    searcher.on_trial_complete("a", {OUTCOME: evaluator.run(first[TASK])})
    searcher.suggest("c")
    assert [task["stage"] for task in standing(load_view(store))["doing"]] == ["elastic student", "baselines"]
    store.set_meta(state="interrupted")
    assert standing(load_view(store))["doing"] == []


def test_after_an_order_to_stop_what_is_recovered_is_confirmed_one_by_one(tmp_path: Path) -> None:
    ready, clock = make_ready(), VirtualClock()
    store = create_study(ready, tmp_path, "s", "x")
    director = director_of(ready, store, clock)
    searcher, evaluator = JointSearch(director), SimulatedEvaluator(store.folder, tmp_path)
    held: list[str] = []  # the first confirmation of a finalist takes long
    running: dict[str, Task] = {}
    for number in range(1000):
        config = searcher.suggest(str(number))
        if isinstance(config, dict):
            running[str(number)] = config[TASK]
            if isinstance(config[TASK], Confirm) and config[TASK].recovered is not None:
                held.append(str(number))
        if len(store.evaluations("recovered", "complete")) > 2 and held:
            break
        clock.now += 0.25
        for trial_id in [t for t in running if t not in held][:1]:
            searcher.on_trial_complete(trial_id, {OUTCOME: evaluator.run(running.pop(trial_id))})
    assert len(held) == 1 and len(store.evaluations("recovered", "complete")) > 2
    order(store.folder, "stop")
    for trial_id in [t for t in running if t not in held]:
        searcher.on_trial_complete(trial_id, {OUTCOME: evaluator.run(running.pop(trial_id))})
    assert [searcher.suggest(f"more{i}") for i in range(3)] == [None] * 3, "the target is in use"
    searcher.on_trial_complete(held[0], {OUTCOME: evaluator.run(running.pop(held[0]))})
    config = searcher.suggest("next")
    assert isinstance(config, dict) and isinstance(config[TASK], Confirm)
    assert searcher.suggest("beside it") is None


def test_an_order_does_not_hide_why_a_search_has_failed(tmp_path: Path) -> None:
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    director = director_of(ready, store, VirtualClock())
    director.state.give_up("the disk is full", 5, "free some")
    order(store.folder, "stop")
    director.apply_command()
    assert (director.state.stop_reason, director.state.exit_code) == ("the disk is full", 5)
    assert director.next().kind == "done" and not vars(director)["is_interrupted"], "what runs may end"
    order(store.folder, "cancel")
    director.apply_command()
    assert vars(director)["is_interrupted"] and director.state.exit_code == 5


def test_recoveries_are_planned_for_the_threads_of_a_worker(tmp_path: Path) -> None:
    """The elastic student was trained on four threads, perhaps by an earlier search; a worker has one."""
    store = create_study(make_ready(), tmp_path, "s", "x")
    store.set_meta(elastic={"tokens": 1_000_000, "elapsed_s": 100.0, "batch_tokens": 4096, "threads": 4, "done": True})
    spec, budget = Spec.model_validate({"budget": "1h"}), Budget(3600.0, clock=lambda: 0.0)
    tokens = []
    for threads in (4, 1):
        store.set_meta(recovery_tokens=None)
        state = SearchState(store, spec, make_ready().space, budget, threads=threads)
        tokens.append(state.costs.recovery_tokens())
    assert tokens[0] == pytest.approx(4 * tokens[1], rel=0.02)


def profile_with(cores: int) -> Profile:
    return detected_profile().model_copy(update={"cores": cores})


@pytest.mark.parametrize(
    ("options", "cores", "layout"),
    [
        ({}, 1, Layout(1, 1)),
        ({}, 8, Layout(1, 8)),
        ({"workers": 2}, 8, Layout(2, 4)),
        ({"workers": 3}, 8, Layout(3, 2)),
        ({"workers": 8}, 8, Layout(8, 1)),
        ({"threads_per_trial": 2}, 8, Layout(4, 2)),
        ({"threads_per_trial": 3}, 8, Layout(2, 3)),
        ({"workers": 2, "threads_per_trial": 3}, 8, Layout(2, 3)),
    ],
)
def test_the_layout_fits_the_machine(
    options: dict[str, int], cores: int, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(16)))
    assert layout_of(Spec.model_validate(options), profile_with(cores)) == layout


def test_a_cluster_may_have_more_cores_than_this_machine() -> None:
    spec = Spec.model_validate({"workers": 3, "threads_per_trial": 16})
    assert layout_of(spec, profile_with(1), "10.0.0.1:6379") == Layout(3, 16)
    assert layout_of(Spec(), profile_with(8), "10.0.0.1:6379") == Layout(1, 8)


@pytest.mark.parametrize(
    ("layout", "cpus"),
    [(Layout(2, 2), [2.0, 1.0]), (Layout(1, 4), [2.0, 2.0]), (Layout(3, 1), [2.0]), (Layout(1, 1), [])],
)
def test_a_cluster_without_room_for_all_workers_is_refused(layout: Layout, cpus: list[float]) -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"needs \d workers? with \d threads?( each)?, but the nodes of the cluster have"
    ):
        require_cpus(layout, cpus)
    require_cpus(layout, [*cpus, float(layout.cores)])


@pytest.mark.parametrize(
    "options", [{"workers": 2}, {"threads_per_trial": 2}, {"workers": 1024, "threads_per_trial": 3}]
)
def test_more_workers_or_threads_than_cores_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at most the 1 core"):
        layout_of(Spec.model_validate(options), profile_with(1))


def test_the_number_of_workers_is_no_setting_of_a_study() -> None:
    assert Spec.model_validate({"workers": 2, "threads_per_trial": 1}).digest() == Spec().digest()
