"""The whole search on the simulated evaluator: policy, calibration, resuming, determinism; no Ray processes."""

import dataclasses
import math
import pickle
import shutil
import time
from collections import Counter
from typing import Any, ClassVar

import pytest

from paretune.common.errors import EnvironmentProblem, NothingFeasible, UsageError
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.measurement import LEFT_PREDICTED
from paretune.search.budget import GRACE_S, Budget
from paretune.search.estimation.calibration import Calibration, Pair
from paretune.search.estimation.finalists import Explored, gaps, next_finalist, perceived
from paretune.search.estimation.state import SearchState
from paretune.search.evaluators import simulated
from paretune.search.evaluators.simulated import SHAPE, SimulatedEvaluator, VirtualClock
from paretune.search.execution.inline import run_inline
from paretune.search.execution.run import run_study
from paretune.search.execution.tune_search import Interrupt, JointSearch
from paretune.search.front import dominates
from paretune.search.policy.director import Director
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study, find_study
from paretune.search.recommend.recommend import Limits, recommend
from paretune.search.samplers.optuna_sampler import distributions, make_sampler, rebuild
from paretune.search.spec import Spec, make_spec, seconds
from paretune.search.study.store import Store
from paretune.search.study.view import load_view, tied
from paretune.search.tasks.base import Outcome
from paretune.search.tasks.evaluation import EvaluationResult
from paretune.search.tasks.recover import Recover
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import load_teacher
from paretune.tracking.mlflow.housekeeper import Housekeeper
from support.plans import empty_plan


def make_ready(**options):
    spec = Spec.model_validate({"budget": "300s", "fit_points": 30, **options})
    profile = detected_profile()
    space = Space.of(SHAPE, profile.weight_formats)
    plan = empty_plan(space, spec)
    return Ready(spec, load_teacher("stdlib-coder"), profile, space, plan)


class Interrupted(Exception):
    """A stand-in for SIGKILL in the simulated search."""


def simulate(ready, store, home, stop_after=None, evaluator_class=SimulatedEvaluator):
    """Run a study inline on a virtual clock; `stop_after` pieces of work end it like a kill."""
    clock = VirtualClock()
    evaluator = evaluator_class(store.folder, home, clock)
    done: Counter[str] = Counter()

    def execute(director, *_):
        director.state.budget.clock = clock
        director.state.budget.__post_init__()

        def evaluate(task):
            done[task.kind] += 1
            if stop_after is not None and sum(done.values()) > stop_after:
                raise Interrupted
            return evaluator.run(task)

        run_inline(director, evaluate)

    code = run_study(store, ready, home, lambda *_: None, None, execute)
    return code, done, clock.now


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    ready = make_ready()
    store = create_study(ready, home, "s", "paretune search")
    code, done, used = simulate(ready, store, home)
    return home, ready, store, code, done, used


def test_a_search_ends_complete_in_its_budget(finished):
    _, ready, store, code, done, used = finished
    assert code == 0 and store.meta("state") == "complete"
    assert used <= ready.spec.budget_s
    assert done["elastic"] == done["fit"] == 1
    assert done["rung0"] >= 60 and done["recover"] >= 5


def test_no_evaluation_is_done_twice(finished):
    *_, store, _, _, _ = finished
    pairs = Counter((e.key, e.fidelity) for e in store.evaluations())
    assert set(pairs.values()) == {1}


def test_the_front_is_not_dominated_and_baselines_are_on_or_under_it(finished):
    view = load_view(finished[2])
    vectors = [p.vector(view.objectives) for p in view.confirmed]
    assert len(view.baselines) == 3
    for point in view.front:
        assert not any(dominates(v, point.vector(view.objectives)) for v in vectors)
    assert len(view.front) - len(view.ties) >= 5


def test_finalists_come_from_several_strata_with_the_same_tokens(finished):
    store = finished[2]
    rows = {r.key: r.candidate for r in store.candidates()}
    recovered = store.evaluations("recovered", "complete")
    assert len({rows[e.key].stratum for e in recovered}) >= 3
    assert store.meta("recovery_tokens") % 4096 == 0


def test_calibration_learns_what_recovery_repairs(finished):
    """The simulation's recovery leaves 60 % of the loss; the calibrated error must beat the raw one clearly."""
    facts = finished[2].meta("calibration")
    assert facts["pairs"] >= 5
    assert facts["median_error_nats"] < 0.5 * facts["median_error_uncalibrated_nats"]


def test_recommendations_keep_limits_and_say_why(finished):
    view = load_view(finished[2])
    free = recommend(view, Limits())
    assert free.chosen in view.front and free.why
    limit = sorted(p.measurements["decode_ms_per_token"].value for p in view.front)[len(view.front) // 2]
    found = recommend(view, Limits(latency_ms=limit))
    assert found.chosen.measurements["decode_ms_per_token"].value <= limit
    assert found.binding == "decode_ms_per_token"
    better = [p for p in view.front if p.measurements["nll"].value < found.chosen.measurements["nll"].value]
    assert all(p.measurements["decode_ms_per_token"].value > limit for p in better)
    fastest = recommend(view, Limits(loss=0.01)).chosen
    assert fastest.measurements["relative_loss"].value <= 0.01
    with pytest.raises(NothingFeasible, match=r"nearest is .*decode_ms_per_token is"):
        recommend(view, Limits(latency_ms=1e-6))
    with pytest.raises(UsageError, match="must be positive"):
        recommend(view, Limits(latency_ms=-1.0))


def proposals(store):
    return [(r.key, r.source) for r in store.candidates()]


@pytest.mark.parametrize("sampler", ["tpe", "sequential"])
def test_an_interrupted_search_proposes_what_the_uninterrupted_one_does(sampler, tmp_path):
    ready = make_ready(budget="260s", sampler=sampler)
    whole = create_study(ready, tmp_path / "a", "s", "x")
    simulate(ready, whole, tmp_path / "a")
    broken = create_study(ready, tmp_path / "b", "s", "x")
    for stop_after in (2, 6, 15, 25):
        with pytest.raises(Interrupted):
            simulate(ready, broken, tmp_path / "b", stop_after)
        assert broken.meta("state") == "interrupted"
        broken.close()
        broken = Store.open_study(tmp_path / "b" / "studies" / "s")
    simulate(ready, broken, tmp_path / "b")
    longest = min(len(proposals(whole)), len(proposals(broken)))
    assert longest > 50
    assert proposals(whole)[:longest] == proposals(broken)[:longest]
    complete = Counter((e.key, e.fidelity) for e in broken.evaluations(status="complete"))
    assert set(complete.values()) == {1}, "something finished was done again"


class Moody(SimulatedEvaluator):
    """Fails, returns NaN-like infeasibility and refuses some candidates."""

    def run(self, task):
        outcome = super().run(task)
        if task.kind == "rung0" and int(task.candidate.key[:2], 16) % 3 == 0:
            return Outcome("infeasible", reason="op X in layer 2 is not supported")
        if task.kind == "recover" and int(task.candidate.key[:2], 16) % 2 == 0:
            return Outcome("failed", reason="the budget ended during recovery")
        return outcome


def test_infeasible_candidates_are_told_as_failed_and_the_search_goes_on(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    code, _, _ = simulate(ready, store, tmp_path, evaluator_class=Moody)
    assert code == 0
    reasons = {e.reason for e in store.evaluations(status="infeasible")}
    assert reasons == {"op X in layer 2 is not supported"}
    director = Director(SearchState(store, ready.spec, ready.space, Budget(1000.0)))
    searcher = JointSearch(director)
    searcher.suggest("t")
    states = Counter(t.state.name for t in searcher._ot_study.trials)
    assert states["RUNNING"] <= 1 and states["COMPLETE"] == len(director.explored_keys())


class Broken(SimulatedEvaluator):
    def run(self, task):
        return Outcome("failed", reason="no space left") if task.kind == "rung0" else super().run(task)


def test_a_search_in_which_everything_fails_gives_up(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    code, done, _ = simulate(ready, store, tmp_path, evaluator_class=Broken)
    assert code == 4 and done["rung0"] < 20
    assert "no space left" in store.meta("ended")


def marked(outcome, **changes):
    """The outcome of a confirmation with a changed latency."""
    found = outcome.found.measurements
    latency = dataclasses.replace(found["decode_ms_per_token"], **changes)
    result = dataclasses.replace(outcome.result, measurements={**found, "decode_ms_per_token": latency})
    return dataclasses.replace(outcome, result=result)


class Noisy(SimulatedEvaluator):
    """The first confirmation of every second candidate falls on a busy moment."""

    mark: ClassVar[dict[str, Any]] = {"provenance": "disturbed"}

    def run(self, task):
        outcome = super().run(task)
        if task.kind == "confirm" and int(task.candidate.key[0], 16) % 2:
            seen = (self.folder / "simulated.log").read_text().count(f"confirm {task.candidate.key}")
            if seen == 1:
                return marked(outcome, value=9.0, **self.mark)
        return outcome


class AgentAway(Noisy):
    mark: ClassVar = {"provenance": "predicted", "note": f"{LEFT_PREDICTED}no agent answers"}


class NeverAtHand(Noisy):
    mark: ClassVar = {"provenance": "predicted", "note": "roofline"}


@pytest.mark.parametrize("evaluator", [Noisy, AgentAway])
def test_disturbed_latencies_are_measured_again_with_what_time_is_left(tmp_path, evaluator):
    ready = make_ready(max_candidates=50, finalists=2, budget="600s")
    store = create_study(ready, tmp_path, "s", "x")
    code, done, _ = simulate(ready, store, tmp_path, evaluator_class=evaluator)
    view = load_view(store)
    assert code == 0 and done["confirm"] > len(view.confirmed), "the simulation disturbed nothing"
    assert {p.measurements["decode_ms_per_token"].provenance for p in view.confirmed} == {"measured"}
    assert len({p.key for p in view.confirmed}) == len(view.confirmed)


def test_what_can_only_be_predicted_is_not_measured_again(tmp_path):
    ready = make_ready(max_candidates=50, finalists=2, budget="600s")
    store = create_study(ready, tmp_path, "s", "x")
    code, done, _ = simulate(ready, store, tmp_path, evaluator_class=NeverAtHand)
    view = load_view(store)
    assert code == 0 and done["confirm"] == len(view.confirmed)
    assert "predicted" in {p.measurements["decode_ms_per_token"].provenance for p in view.confirmed}


class NoTeacher(SimulatedEvaluator):
    def run(self, task):
        return Outcome("infeasible", reason="op Y is unknown") if task.kind == "confirm" else super().run(task)


def test_a_teacher_that_cannot_run_ends_the_search_with_its_reason(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    code, done, _ = simulate(ready, store, tmp_path, evaluator_class=NoTeacher)
    assert code == 4 and sum(done.values()) == 1
    assert "the teacher itself could not be confirmed: op Y is unknown" in store.meta("ended")


def test_limits_of_the_spec_become_constraints(tmp_path):
    ready = make_ready(limits={"decode_ms_per_token": 1.5})
    store = create_study(ready, tmp_path, "s", "x")
    simulate(ready, store, tmp_path)
    recovered = {e.key for e in store.evaluations("recovered", "complete")}
    confirmed = {e.key: e for e in store.evaluations("confirmed", "complete")}
    assert recovered and all(
        confirmed[k].measurements["decode_ms_per_token"].value <= 1.6 for k in recovered & confirmed.keys()
    )


def test_nsga2_can_be_chosen(tmp_path):
    ready = make_ready(sampler="nsga2", budget="200s")
    store = create_study(ready, tmp_path, "s", "x")
    assert simulate(ready, store, tmp_path)[0] == 0


@pytest.mark.parametrize("sampler", ["tpe", "sequential"])
def test_a_tiny_space_is_exhausted_not_repeated(sampler, tmp_path):
    ready = make_ready(sampler=sampler, loss_of_interest=5.0)
    small = Space(SHAPE, ("fp32/fp32",), 6, 768, 3)
    ready = Ready(ready.spec, ready.teacher, ready.profile, small, ready.plan)
    store = create_study(ready, tmp_path, "s", "x")
    code, done, _ = simulate(ready, store, tmp_path)
    assert code == 0 and store.meta("exhausted") is True
    assert done["rung0"] + 1 == small.size(), "every candidate but the confirmed baseline is explored once"


def test_a_slow_machine_confirms_finalists_before_it_has_explored_the_first_wave(tmp_path, monkeypatch):
    """Seconds as a CPU without fast bfloat16 took them, for a demo that ended with its baselines alone."""
    slow = {"fit": 80.0, "elastic": 137.0, "sensitivity": 18.0, "rung0": 5.0, "recover": 20.0, "confirm": 32.0}
    monkeypatch.setattr(simulated, "SECONDS", slow)
    ready = make_ready(budget="540s")
    store = create_study(ready, tmp_path, "s", "x")
    code, done, seconds = simulate(ready, store, tmp_path)
    assert code == 0 and seconds <= 540
    assert done["rung0"] < 40 and done["confirm"] >= 3 + 2, done


def test_next_finalist_visits_each_stratum_and_prefers_the_front():
    explored = [
        Explored("a", "dense/int4", (1.0, 1.0)),
        Explored("b", "dense/int4", (2.0, 2.0)),
        Explored("c", "2:4/int4", (3.0, 3.0)),
    ]
    assert next_finalist(explored, [], []) == "a"
    assert next_finalist(explored, ["a"], []) in {"b", "c"}
    assert next_finalist(explored, ["a", "b", "c"], []) is None


def test_the_next_finalist_is_far_from_what_is_confirmed():
    """Crowding among the unconfirmed alone would take a second one beside a confirmed, as the ends are always lonely."""
    line = [Explored(f"e{i}", "dense/int8", (float(i), 10.0 - i)) for i in range(11)]
    confirmed: list[tuple[float, ...]] = [(0.0, 10.01), (10.01, 0.0)]  # beside both ends
    assert next_finalist(line, [], confirmed) == "e5"
    assert next_finalist(line, ["e5"], [*confirmed, (5.01, 5.01)]) in {"e2", "e3", "e7", "e8"}


def test_gaps_are_distances_to_the_nearest_in_units_of_the_range():
    points = [(0.0, 5.0), (1.0, 5.0), (4.0, 5.0)]
    assert gaps(points, []) == [math.inf] * 3
    assert gaps(points, [(0.0, 5.0)]) == [0.0, 0.25, 1.0]
    assert gaps(points, [(0.0, 5.0), (4.0, 6.0)]) == [0.0, 0.25, 1.0], (
        "the second objective counts as much as the first"
    )
    assert gaps([(1.0, 7.0)], [(1.0, 7.0)]) == [0.0] and gaps([], [(1.0,)]) == []


def test_finalists_are_spread_over_what_people_perceive():
    """On a linear scale nothing below 5 % would ever be far from the teacher."""
    assert perceived((2.0, 8.0), 0, 2.0) == perceived((2.001, 8.0), 0, 2.0), "below half a per cent all are equal"
    a, b, c, d = (perceived((2.0 * (1 + x), 8.0), 0, 2.0)[0] for x in (0.005, 0.02, 0.05, 0.2))
    assert b - a == pytest.approx(d - c)
    assert perceived((0.2, -1.0), 1, -1.0)[1] == pytest.approx(math.log(0.005)), (
        "a quality that is maximized is negative"
    )
    losses = [0.006, 0.02, 0.06, 0.1, 0.14, 0.18, 0.25]
    line = [Explored(str(x), "dense/int4", (2.0 * (1 + x), 1 / (1 + x))) for x in losses]
    done: list[tuple[float, ...]] = [(2.0, 1.0), (2.0 * 1.25, 1 / 1.25)]

    def nearest(scale):
        return next_finalist(line, [], done, scale)

    assert float(nearest(lambda v: perceived(v, 0, 2.0))) < float(nearest(tuple))


def test_calibration_is_the_identity_without_pairs_and_finds_a_law():
    space = Space.of(SHAPE, ("fp32/fp32", "int8/int8", "int4/int8"))
    import random

    generator = random.Random(1)
    candidates = [
        space.decode(
            {
                n: generator.randint(*b) if k == "int" else generator.choice(b)
                for n, (k, b) in space.distributions().items()
            }
        )
        for _ in range(30)
    ]
    assert Calibration(SHAPE, []).estimate(candidates[0], 0.3) == pytest.approx(0.3)
    pairs = [Pair(c, r := generator.uniform(0.05, 0.6), 0.5 * r) for c in candidates]
    fitted = Calibration(SHAPE, pairs)
    assert fitted.median_error < 0.3 * fitted.prior_error


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("45m", 2700), ("8h", 28800), ("1.5h", 5400)])
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "8", "0s", "-3m", "1w", "h"])
def test_bad_durations(text):
    with pytest.raises(UsageError, match="budget"):
        make_spec(None, "quick", {"budget": text})


def test_task_and_outcome_travel_by_pickle(finished):
    """As Ray sends them."""
    store = finished[2]
    task = Recover(store.candidates()[5].candidate, 4096, seconds_left=12.5, timeout_s=30.0)
    assert pickle.loads(pickle.dumps(task)) == task
    e = store.evaluations("confirmed", "complete")[0]
    outcome = Outcome(result=EvaluationResult(e.scores, e.measurements, e.facts, ("a", "b")))
    assert pickle.loads(pickle.dumps(outcome)) == outcome


def test_ties_are_paired_by_document(finished):
    view = load_view(finished[2])
    point = view.front[0]
    assert tied(point, point, "nll") and tied(point, point, "decode_ms_per_token")
    teacher = view.teacher
    worst = max(view.confirmed, key=lambda p: p.measurements["nll"].value)
    assert teacher is not None and not tied(teacher, worst, "nll")


def test_a_whole_simulated_search_is_quick(finished):
    """Not a timing: guards that the simulation never sleeps."""
    assert math.isfinite(time.monotonic()) and finished[5] > 100


class FullDisk(SimulatedEvaluator):
    """The disk is full during the first recovery."""

    def run(self, task):
        if task.kind == "recover" and not (self.folder / "mended").exists():
            return Outcome("fatal", reason="No space left on device", exit_code=5)
        return super().run(task)


def test_a_full_disk_ends_resumable_and_loses_no_finalist(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    code, _, _ = simulate(ready, store, tmp_path, evaluator_class=FullDisk)
    assert code == 5 and store.meta("state") == "interrupted"
    assert not store.evaluations("recovered", "failed"), "what the disk did is not the candidate's fault"
    store.close()
    name, exists = find_study(tmp_path, ready, None)
    assert (name, exists) == ("s", True)
    (tmp_path / "studies" / "s" / "mended").touch()
    store = Store.open_study(tmp_path / "studies" / "s")
    assert simulate(ready, store, tmp_path, evaluator_class=FullDisk)[0] == 0


class Fragile(SimulatedEvaluator):
    """Every second try of a confirmation fails, the first one is disturbed."""

    def run(self, task):
        outcome = super().run(task)
        if task.kind != "confirm":
            return outcome
        if (self.folder / "simulated.log").read_text().count(f"confirm {task.candidate.key}") > 1:
            return Outcome("failed", reason="the machine is gone")
        return marked(outcome, provenance="disturbed")


def test_a_failed_remeasurement_takes_nothing_away(tmp_path):
    ready = make_ready(max_candidates=45, finalists=1, budget="600s")
    store = create_study(ready, tmp_path, "s", "x")
    simulate(ready, store, tmp_path, evaluator_class=Fragile)
    assert store.meta("ended") != "the teacher itself could not be confirmed: the machine is gone"
    assert len(load_view(store).confirmed) >= 3


def test_a_study_is_continued_only_by_the_same_search(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    store.close()
    assert find_study(tmp_path, ready, "s") == ("s", True)
    changed = dataclasses.replace(ready, teacher=dataclasses.replace(ready.teacher, digest="other weights"))
    with pytest.raises(UsageError, match="teacher, text, profile or machine has changed"):
        find_study(tmp_path, changed, "s")
    assert find_study(tmp_path, changed, None)[1] is False
    assert find_study(tmp_path, dataclasses.replace(ready, text="other text"), None)[1] is False


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", ".hidden", "a#b", "x" * 200])
def test_study_names_cannot_leave_the_home(tmp_path, name):
    with pytest.raises(UsageError, match="letters, digits"):
        find_study(tmp_path, make_ready(), name)


def test_a_damaged_study_does_not_block_a_new_one(tmp_path):
    (tmp_path / "studies" / "torn").mkdir(parents=True)
    (tmp_path / "studies" / "torn" / "study.db").write_bytes(b"")
    assert find_study(tmp_path, make_ready(), None)[1] is False


def test_odd_characters_in_the_home_stay_in_the_home(tmp_path):
    home = tmp_path / "a#b ?c%41"
    store = create_study(make_ready(), home, "s", "x")
    store.close()
    assert (home / "studies" / "s" / "study.db").stat().st_size > 0
    assert Store.reader(home / "studies" / "s").meta("study") == "s"


def test_the_driver_ends_what_a_stuck_worker_would_keep_alive(tmp_path):
    ready, clock = make_ready(), VirtualClock()
    store = create_study(ready, tmp_path, "s", "x")
    director = Director(SearchState(store, ready.spec, ready.space, Budget(100.0, clock=clock)))
    stopper = Interrupt(director)
    assert not stopper.stop_all()
    clock.now = 100.0 + GRACE_S - 1.0
    assert not stopper.stop_all(), "the worker has some seconds to end by itself"
    clock.now = 100.0 + GRACE_S + 1.0
    assert stopper.stop_all()


def test_nsga2_really_breeds(tmp_path, monkeypatch):
    ready = make_ready(sampler="nsga2", budget="400s")
    store = create_study(ready, tmp_path, "s", "x")
    seen = {}

    class Watched(JointSearch):
        def _tell(self, trial_id, key):
            super()._tell(trial_id, key)
            seen["study"] = self._ot_study

    monkeypatch.setattr("paretune.search.execution.inline.JointSearch", Watched)
    simulate(ready, store, tmp_path)
    generations = {v for t in seen["study"].trials for n, v in t.system_attrs.items() if n.endswith("generation")}
    assert max(generations) >= 2


def test_the_balance_does_not_depend_on_the_order_of_objectives(finished):
    view = load_view(finished[2])
    turned = dataclasses.replace(view, objectives=("compressed_bytes", "nll", "decode_ms_per_token"))
    assert recommend(turned, Limits()).chosen.key == recommend(view, Limits()).chosen.key


def test_the_specs_limits_bind_the_recommendation(finished):
    view = load_view(finished[2])
    limit = sorted(p.measurements["decode_ms_per_token"].value for p in view.front)[1]
    limited = dataclasses.replace(view, meta={**view.meta, "spec": {"limits": {"decode_ms_per_token": limit}}})
    assert recommend(limited, Limits()).chosen.measurements["decode_ms_per_token"].value <= limit


@pytest.mark.parametrize(
    "bad", [{"limits": {"bytes": 0}}, {"shares": {"explore": 0.9}}, {"objectives": ["nll", "nll"]}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(UsageError):
        make_spec(None, "quick", bad)


class Picky(SimulatedEvaluator):
    """Nothing but the baselines can be built; `same` decides whether always for the same reason."""

    same = False

    def run(self, task):
        outcome = super().run(task)
        if task.kind != "rung0":
            return outcome
        return Outcome("infeasible", reason="no kernel" if self.same else f"no kernel for {task.candidate.key}")


class PickyAlike(Picky):
    same = True


@pytest.mark.parametrize(("evaluator", "stops"), [(Picky, False), (PickyAlike, True)])
def test_impossible_candidates_end_a_search_only_if_all_say_the_same(tmp_path, evaluator, stops):
    ready = make_ready(max_candidates=40)
    store = create_study(ready, tmp_path, "s", "x")
    code, done, _ = simulate(ready, store, tmp_path, evaluator_class=evaluator)
    assert (done["rung0"] == 8) == stops
    assert (code == 4) == stops
    assert ("8 evaluations failed in a row, the last one with: no kernel" in store.meta("ended")) == stops


class Mixed(SimulatedEvaluator):
    """Every rung-0 score fails but for each third, which is infeasible."""

    def run(self, task):
        if task.kind != "rung0":
            return super().run(task)
        third = len((self.folder / "simulated.log").read_text().splitlines()) % 3 == 0
        super().run(task)
        return Outcome("infeasible", reason="no kernel") if third else Outcome("failed", reason="no space left")


def test_impossible_candidates_between_failures_do_not_hide_them(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    code, _, _ = simulate(ready, store, tmp_path, evaluator_class=Mixed)
    assert code == 4 and "8 evaluations failed in a row, the last one with: no space left" in store.meta("ended")
    assert len(store.evaluations("rung0", "failed")) == 8


class Vanishing(SimulatedEvaluator):
    """Somebody removes the study's folder in the middle."""

    def run(self, task):
        outcome = super().run(task)
        if len((self.folder / "simulated.log").read_text().splitlines()) == 12:
            shutil.rmtree(self.folder)
        return outcome


def test_a_study_folder_that_disappears_is_a_clear_end(tmp_path):
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    with pytest.raises(EnvironmentProblem, match=r"study folder .*s was removed or unmounted.*bring it back") as error:
        simulate(ready, store, tmp_path, evaluator_class=Vanishing)
    assert error.value.exit_code == 5
    keeper = Housekeeper(store, tmp_path)
    assert keeper.finish() is None, "nothing is reported of a study that is gone"
    assert not (tmp_path / "studies" / "s").exists()


def test_ctrl_c_is_no_attempt(tmp_path):
    """As Tune does it: the signal comes, the worker is stopped, its trial ends without a result."""
    ready = make_ready()
    store = create_study(ready, tmp_path, "s", "x")
    for _ in range(5):
        director = Director(SearchState(store, ready.spec, ready.space, Budget(1000.0)))
        task = director.next().task
        assert task is not None and task.kind == "confirm", "the first baseline is due however often it was stopped"
        director.interrupt()
        director.lost(task, "the worker was stopped", 1.0)
        assert director.next().kind == "done" and director.state.exit_code == 130
    assert store.evaluations() == []
    director = Director(SearchState(store, ready.spec, ready.space, Budget(1000.0)))
    for _ in range(3):
        task = director.next().task
        assert task is not None
        director.lost(task, "the worker died", 1.0)
    assert [e.status for e in store.evaluations()] == ["lost", "lost", "failed"], "dying is an attempt"


class AlwaysDisturbed(SimulatedEvaluator):
    def run(self, task):
        outcome = super().run(task)
        if task.kind != "confirm":
            return outcome
        return marked(outcome, provenance="disturbed")


def test_a_front_that_is_empty_by_disturbance_says_so(tmp_path):
    ready = make_ready(max_candidates=45, finalists=1)
    store = create_study(ready, tmp_path, "s", "x")
    simulate(ready, store, tmp_path, evaluator_class=AlwaysDisturbed)
    view = load_view(store)
    assert view.front == () and len(view.confirmed) >= 3
    with pytest.raises(NothingFeasible, match=rf"all {len(view.confirmed)} confirmed candidates were disturbed"):
        recommend(view, Limits())


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_limits_must_be_positive_and_finite(finished, limit):
    with pytest.raises(UsageError, match="relative_loss got"):
        recommend(load_view(finished[2]), Limits(loss=limit))


def test_optuna_never_hears_of_a_baseline_as_a_failure(finished):
    """Rebuilt from the store, the study has the explored candidates and nothing else."""
    _, ready, store, *_ = finished
    director = Director(SearchState(store, ready.spec, ready.space, Budget(1000.0)))
    study = rebuild(
        director.state.estimates, make_sampler("tpe", 0, distributions(ready.space)), distributions(ready.space)
    )
    assert len(study.trials) == len(director.explored_keys())
    assert {t.state.name for t in study.trials} == {"COMPLETE"}
