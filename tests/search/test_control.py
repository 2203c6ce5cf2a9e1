"""Pause, resume, stop and cancel: what a search makes of them, and what is refused."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from paretune.common.errors import UsageError
from paretune.common.files import write_atomically
from paretune.hardware_profiles.profile import detected_profile
from paretune.search.evaluators.simulated import SHAPE, SimulatedEvaluator, VirtualClock
from paretune.search.execution.inline import run_inline
from paretune.search.execution.run import run_study
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study, find_study
from paretune.search.spec import Spec
from paretune.search.study import control
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import load_teacher
from support.plans import empty_plan


def make_ready(**options):
    spec = Spec.model_validate({"budget": "300s", "fit_points": 30, "max_candidates": 30, "finalists": 2, **options})
    profile = detected_profile()
    space = Space.of(SHAPE, profile.weight_formats)
    plan = empty_plan(space, spec)
    return Ready(spec, load_teacher("stdlib-coder"), profile, space, plan)


def simulate(ready, store, home, verb=None, before=None, count=1):
    """Run inline; `verb` is ordered while the `count`-th piece of work of kind `before` runs."""
    clock = VirtualClock()
    done: Counter[str] = Counter()
    evaluator = SimulatedEvaluator(store.folder, home, clock)

    def execute(director, *_):
        director.state.budget.clock = clock
        director.state.budget.__post_init__()

        def evaluate(work):
            done[work.kind] += 1
            if work.kind == before and done[before] == count:
                control.order(store.folder, verb)
            return evaluator.run(work)

        run_inline(director, evaluate)

    return run_study(store, ready, home, lambda *_: None, None, execute), done


@pytest.fixture
def study(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "paretune search")
    yield ready, store, tmp_path
    store.close()


def test_a_paused_search_ends_after_what_runs_and_goes_on_later(study):
    ready, store, home = study
    code, done = simulate(ready, store, home, "pause", "rung0", 5)
    assert code == 130 and store.meta("state") == "paused" and done["rung0"] == 5
    assert all(e.status != "running" for e in store.evaluations())
    assert find_study(home, ready, None) == ("s", True), "the same search is this one"
    spent = store.meta("spent_s")
    code, more = simulate(ready, store, home)
    assert code == 0 and store.meta("state") == "complete" and store.meta("spent_s") > spent
    pairs = Counter((e.key, e.fidelity) for e in store.evaluations())
    assert set(pairs.values()) == {1}, "nothing is done twice"
    assert more["fit"] == 0, "nor what was done before the pause"


def test_a_paused_search_proposes_what_an_uninterrupted_one_would(study, tmp_path):
    ready, store, home = study
    simulate(ready, store, home, "pause", "rung0", 12)
    simulate(ready, store, home)
    whole = create_study(ready, tmp_path / "whole", "s", "paretune search")
    simulate(ready, whole, tmp_path / "whole")
    assert [r.key for r in store.candidates()] == [r.key for r in whole.candidates()]
    whole.close()


def test_a_stopped_search_confirms_what_it_has_recovered_and_is_complete(study):
    ready, store, home = study
    code, done = simulate(ready, store, home, "stop", "recover")
    assert code == 0 and store.meta("state") == "complete" and store.meta("ended") == "stopped"
    assert done["recover"] == 1 and len(store.evaluations("confirmed", "complete")) == 4, "three baselines and that one"
    with pytest.raises(UsageError, match="is complete"):
        find_study(home, ready, "s")


def test_a_search_that_is_stopped_early_says_that_only_baselines_are_there(study):
    ready, store, home = study
    code, _ = simulate(ready, store, home, "stop", "rung0")
    assert code == 3 and store.meta("state") == "complete"


def test_a_cancelled_search_keeps_its_results_and_is_never_resumed(study):
    ready, store, home = study
    code, done = simulate(ready, store, home, "cancel", "rung0", 3)
    assert code == 130 and store.meta("state") == "cancelled" and done["rung0"] == 3
    assert len(load_view(store).front) >= 1
    assert find_study(home, ready, None)[1] is False, "the same search is a new study"
    with pytest.raises(UsageError, match="is cancelled"):
        find_study(home, ready, "s")


def test_a_word_is_forgotten_when_the_search_starts_again(study):
    ready, store, home = study
    simulate(ready, store, home, "pause", "rung0", 2)
    assert control.ordered(store.folder) is None
    write_atomically(store.folder / control.FILE, b'{"verb": "cancel"}')
    assert simulate(ready, store, home)[0] == 0


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"verb": "explode"}', b'{"verb": ["stop"]}', b"\xff"])
def test_a_damaged_word_is_none(study, damage):
    _, store, _ = study
    (store.folder / control.FILE).write_bytes(damage)
    with pytest.warns(RuntimeWarning) if damage in (b"", b"\xff") else _quiet():
        assert control.ordered(store.folder) is None


def _quiet():
    import contextlib

    return contextlib.nullcontext()


def test_where_nothing_runs_only_stop_and_cancel_make_sense(tmp_path):
    ready = make_ready()
    ends: tuple[tuple[control.Verb, str], ...] = (("stop", "complete"), ("cancel", "cancelled"))
    for verb, state in ends:
        create_study(ready, tmp_path, verb, "paretune search").close()
        folder = tmp_path / "studies" / verb
        with pytest.raises(UsageError, match="only a running search can be paused"):
            control.order(folder, "pause")
        assert control.order(folder, verb) == f"{verb} is {state}"
        assert control.state_of(folder) == state
        for again in control.VERBS:
            with pytest.raises(UsageError, match="has not ended"):
                control.order(folder, again)
    with pytest.raises(UsageError, match="no study is called"):
        control.order(tmp_path / "studies" / "none", "stop")


SPEC = "budget: 5m\nfit_points: 30\nmax_candidates: 400\nfinalists: 1\n"


class Searches:
    """Real processes with Ray and the simulated evaluator, in one home."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "spec.yaml").write_text(SPEC)
        self.environment = {
            **os.environ,
            "PARETUNE_EVALUATOR": "paretune.search.evaluators.simulated:SimulatedEvaluator",
            "PARETUNE_SIMULATED_SLEEP": "0.1",
            "PARETUNE_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
        }

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "paretune", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def say(self, *arguments):
        done = subprocess.run(
            [sys.executable, "-m", "paretune", *arguments, "--json"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr

    def wait_for(self, explored):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            database = self.folder / "home" / "studies" / "s" / "study.db"
            if database.exists():
                store = Store.reader(database.parent)
                number = len(store.evaluations("rung0", "complete"))
                store.close()
                if number >= explored:
                    return
            time.sleep(0.1)
        raise AssertionError(f"{explored} candidates were not explored in 90 s")


def test_a_real_search_is_paused_resumed_and_stopped_from_elsewhere(tmp_path):
    searches = Searches(tmp_path)
    first = searches.start("search", "spec.yaml", "--study", "s")
    try:
        searches.wait_for(3)
        code, told = searches.say("pause", "s")
        assert code == 0 and "what runs is finished" in told["told"]
        assert first.wait(240) == 130, first.stderr.read()[-2000:]
        assert searches.say("status", "s")[1]["state"] == "paused"
        explored = searches.say("status", "s")[1]["explored"]
        second = searches.start("resume", "s")
        searches.wait_for(explored + 3)
        assert searches.say("resume", "s")[0] == 5, "two searches on one study are refused"
        assert searches.say("stop", "s")[0] == 0
        assert second.wait(240) in (0, 3), second.stderr.read()[-2000:]
        state = searches.say("status", "s")[1]
        assert state["state"] == "complete" and state["explored"] < 400
        assert searches.say("resume", "s")[0] == 2
    finally:
        first.kill()
