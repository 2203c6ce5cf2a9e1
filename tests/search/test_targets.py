"""Many targets, one study: a simulated search from the command line to report, picture and MLflow's files.

What a target costs comes from a small predictor with two opposite laws, so that targets disagree about who is best.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from paretune.cli import app as cli
from paretune.common.command_line import pasted
from paretune.common.errors import EnvironmentProblem, Infeasible, UsageError
from paretune.common.yaml_file import dump_model
from paretune.hardware_profiles import fingerprint
from paretune.hardware_profiles.profile import Profile, detected_profile, load_profile
from paretune.objectives.measurement import Measurement, Provenance
from paretune.objectives.prediction.latency_fit import KERNEL_BITS, weights_per_kernel
from paretune.search.evaluators.simulated import SHAPE
from paretune.search.execution import finish_targets as finishing
from paretune.search.execution import run
from paretune.search.recommend.answer import answer_on
from paretune.search.recommend.compare import Comparison, compare
from paretune.search.recommend.regret import INFEASIBLE
from paretune.search.spec import Spec
from paretune.search.study.store import Store
from paretune.search.study.target_records import TargetRow
from paretune.search.study.target_view import view_on
from paretune.search.study.view import StudyView, load_view, tied
from paretune.search.targets import profiles as target_profiles
from paretune.search.targets import targets
from paretune.search.targets.targets import add_targets
from paretune.tracking.charts.targets_picture import targets_figure
from paretune.tracking.mlflow import housekeeper
from paretune.tracking.mlflow.runs import _write_files
from paretune.tracking.report.report import report_html

SPEC = "budget: 5m\nfit_points: 30\nmax_candidates: 44\nfinalists: 2\n"
MEMORY = {"board": 10**9, "server": 10**12, "small": 9_000_000, "nothing": 1_000_000}
DECODE = "decode_ms_per_token"


def write_profile(home, name, **changes):
    """A target that is not at hand, as a YAML file of the home."""
    figures = {"bandwidth_gb_per_s": 20.0, "peak_fp32_tflops": 0.1}
    known: dict[str, Any] = {k: v for k, v in {"at_hand": False, **figures}.items() if k in Profile.model_fields}
    if "sources" in Profile.model_fields:
        known["sources"] = dict.fromkeys(figures, "made up for a test")
    wanted = {"name": name, "memory_bytes": MEMORY.get(name, 10**9), **known, **changes}
    made = detected_profile().model_copy(update=wanted)
    (home / "profiles").mkdir(parents=True, exist_ok=True)
    (home / "profiles" / f"{name}.yaml").write_text(dump_model(made, name))
    return made


def weight_bytes(candidate, shape):
    layers, head = weights_per_kernel(candidate, shape)
    return sum(1e6 * m * KERNEL_BITS[kernel] / 8 for found in (layers, head) for kernel, m in found.items())


def predict(profile, candidate, shape, prompt=128, context=128, batch=1):
    """`server` pays for bytes, every other target for layers; weights must fit into memory."""
    size = weight_bytes(candidate, shape)
    if size > profile.memory_bytes:
        raise Infeasible(f"needs {size / 1e6:.1f} MB, but {profile.name} has {profile.memory_bytes / 1e6:.3f} MB", "")
    decode = 1e-7 * size if profile.name == "server" else 0.3 * len(candidate.layers) + 1e-9 * size
    values = {DECODE: (decode, "ms/token"), "ttft_ms": (9 * decode, "ms"), "peak_memory_bytes": (size, "bytes")}
    return {n: Measurement(v, unit, 0.6 * v, 1.7 * v, "predicted", 1, "", "priors") for n, (v, unit) in values.items()}


@pytest.fixture(autouse=True)
def small_predictor(monkeypatch):
    module = ModuleType("paretune.objectives.prediction.predict")
    vars(module)["predict"] = predict
    monkeypatch.setitem(sys.modules, "paretune.objectives.prediction.predict", module)
    monkeypatch.setattr(housekeeper, "try_drain", lambda *_: None)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr without line breaks)."""

    def found(*arguments, home):
        monkeypatch.setattr(sys, "argv", ["paretune", *map(str, arguments), "--home", str(home)])
        try:
            cli.main()
            code: str | int = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return found


def inline(original):
    """`run_study` on the evaluator that the environment names, in this process instead of Ray's."""
    from paretune.search.execution.inline import run_inline
    from paretune.search.execution.trainable import make_evaluator

    def run_study(store, ready, home, notify, _address=None):
        evaluator = make_evaluator(store.folder, home)
        return original(store, ready, home, notify, None, lambda director, *_: run_inline(director, evaluator.run))

    return run_study


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The home of a search for four targets, by the command line."""
    home = tmp_path_factory.mktemp("targets")
    for name in MEMORY:
        write_profile(home, name)
    (home / "spec.yaml").write_text(SPEC)
    module = ModuleType("paretune.objectives.prediction.predict")
    vars(module)["predict"] = predict
    wanted = [f"--profile={name}" for name in ("local-cpu", "board", "server", "small")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARETUNE_EVALUATOR", "paretune.search.evaluators.simulated:SimulatedEvaluator")
        patch.setitem(sys.modules, "paretune.objectives.prediction.predict", module)
        patch.setattr(housekeeper, "try_drain", lambda *_: None)
        patch.setattr(run, "run_study", inline(run.run_study))
        patch.setattr(
            sys, "argv", ["paretune", "search", f"{home / 'spec.yaml'}", *wanted, "--study=s", f"--home={home}"]
        )
        cli.main()
    return home


@pytest.fixture
def home(searched, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(searched, tmp_path / "home")
    return tmp_path / "home"


def view_of(home, study="s"):
    store = Store.reader(home / "studies" / study)
    try:
        return load_view(store)
    finally:
        store.close()


def test_the_search_prices_every_candidate_and_takes_quality_once(searched):
    view = view_of(searched)
    assert [t.name for t in view.targets] == ["board", "server", "small"] and len(view.confirmed) >= 6
    log = (searched / "studies" / "s" / "simulated.log").read_text().splitlines()
    confirms = Counter(line.split()[1] for line in log if line.startswith("confirm "))
    assert set(confirms) == {p.key for p in view.confirmed} and set(confirms.values()) == {1}
    for target in view.targets:
        there = view_on(view, target)
        assert set(target.rows) == {p.key for p in view.confirmed} and target.measured == 0
        for p in there.confirmed:
            mine = view.point(p.key)
            want = predict(Profile.model_validate(target.profile), p.candidate, SHAPE)[DECODE]
            assert p.measurements[DECODE] == want
            assert p.measurements["nll"] == mine.measurements["nll"] and p.scores == mine.scores
            assert p.measurements["compressed_bytes"] == mine.measurements["compressed_bytes"]
            assert "decode_p90_ms" not in p.measurements
    assert view.seconds_by_stage[finishing.STAGE] < 0.05 * view.meta["budget_s"]
    assert view.meta["spent_s"] <= view.meta["budget_s"] and view.meta["spec"]["targets"] == [
        "board",
        "server",
        "small",
    ]


def test_the_command_shows_fronts_and_the_matrix_of_the_definition(searched, call):
    code, out, _ = call("targets", "s", "--json", home=searched)
    data, view = json.loads(out), view_of(searched)
    assert code == 0 and [t["name"] for t in data["targets"]] == ["local-cpu", "board", "server", "small"]
    losses = {p.key: p.measurements["relative_loss"].value for p in view.confirmed}
    costs = {t["name"]: {k: c[DECODE]["value"] for k, c in t["costs"].items()} for t in data["targets"]}
    worst_seen = 0.0
    for regret in data["regret"]:
        inside = {t: {k: c for k, c in row.items() if losses[k] <= regret["loss"]} for t, row in costs.items()}
        for i, a in enumerate(regret["targets"]):
            choice = min(inside[a], key=lambda k: (inside[a][k], losses[k], k), default=None)
            assert regret["choices"][a] == choice
            for j, b in enumerate(regret["targets"]):
                value = regret["matrix"][i][j]
                if choice is None or not inside[b]:
                    assert value is None
                elif choice not in inside[b]:
                    assert value == "infeasible"
                else:
                    assert value == pytest.approx(inside[b][choice] / min(inside[b].values()) - 1)
                    worst_seen = max(worst_seen, value)
                assert regret["provenance"][i][j] == ("measured" if b == "local-cpu" else "predicted")
    assert worst_seen > 0.01, "the targets agree on everything, so this test would not see a wrong matrix"
    code, out, _ = call("targets", "s", home=searched)
    assert code == 0 and "regret within" in out and "smallest worst regret" in out


def test_memory_that_does_not_suffice_is_shown(searched, call):
    data = json.loads(call("targets", "s", "--json", home=searched)[1])
    small, view = data["targets"][3], view_of(searched)
    assert set(small["infeasible"]) == {
        p.key for p in view.confirmed if weight_bytes(p.candidate, SHAPE) > MEMORY["small"]
    }
    assert view.teacher.key in small["infeasible"] and view.teacher.key not in small["front"] and small["front"]
    page = report_html(view)
    assert "has 9.000 MB" in page and "What cannot run where" in page
    _, _, err = call("targets", "s", home=searched)
    assert "small: needs" in err


def test_adding_again_changes_nothing(home, call):
    before = view_of(home)
    code, _, err = call("targets", "s", "--profile", "server", "--profile", "board", "--seconds", "0", home=home)
    after = view_of(home)
    assert code == 0, err
    assert [(t.name, t.profile, t.rows, t.notes) for t in before.targets] == [
        (t.name, t.profile, t.rows, t.notes) for t in after.targets
    ]


def test_a_target_whose_profile_changed_is_priced_anew(home, call):
    write_profile(home, "small", memory_bytes=10**9)
    assert call("targets", "s", "--profile", "small", home=home)[0] == 0
    view = view_of(home)
    assert [t.name for t in view.targets] == ["board", "server", "small"] and not view.targets[2].infeasible


def test_recommendations_follow_the_target(searched, call):
    view = view_of(searched)
    for name in ("board", "server"):
        data = json.loads(call("recommend", "s", "--max-loss", "10%", "--profile", name, "--json", home=searched)[1])
        there = view_on(view, next(t for t in view.targets if t.name == name))
        inside = [p for p in there.confirmed if p.measurements["relative_loss"].value <= 0.1]
        assert data["profile"] == name and data["chosen"]["measurements"][DECODE]["provenance"] == "predicted"
        assert data["chosen"]["measurements"][DECODE]["value"] == min(p.measurements[DECODE].value for p in inside)
    code, out, _ = call("recommend", "s", "--profile", "server", home=searched)
    assert code == 0 and "costs on server are predicted\n" in out and "(predicted)" in out
    assert "costs on" not in call("recommend", "s", home=searched)[1]


def test_a_target_that_was_never_added_is_predicted_on_the_fly(home, call):
    write_profile(home, "other")
    code, out, _ = call("recommend", "s", "--profile", "other", home=home)
    assert (
        code == 0
        and f"costs on other are predicted on the fly; `{pasted('targets', 's', '--profile', 'other', home=home)}` keeps them"
        in out
    )
    assert "other" not in [t.name for t in view_of(home).targets]
    code, _, err = call("recommend", "s", "--profile", "nothing", home=home)
    assert code == 4 and "no confirmed candidate runs on nothing: needs" in err and "remedy" in err


def test_a_target_on_which_nothing_runs_is_kept_and_shown(home, call):
    code, out, err = call("targets", "s", "--profile", "nothing", "--json", home=home)
    assert code == 0, err
    found = json.loads(out)["targets"][-1]
    assert (
        found["front"] == []
        and found["recommended"] is None
        and len(found["infeasible"]) == len(view_of(home).confirmed)
    )
    assert json.loads(out)["regret"][2]["robust"] is not None, (
        "a target that nothing serves must not decide for the others"
    )
    assert "nothing" in report_html(view_of(home))
    targets_figure(compared(view_of(home))).to_json()


@pytest.mark.parametrize("command", [("search", "--profile", "local-cpu"), ("targets", "s"), ("recommend", "s")])
def test_an_unknown_profile_is_refused_with_the_nearest_name(searched, call, command):
    code, _, err = call(*command, "--profile", "bord", home=searched)
    assert code == 2 and "did you mean 'board'?" in err
    assert [t.name for t in view_of(searched).targets] == ["board", "server", "small"]


@pytest.mark.parametrize(
    "command",
    [
        ("search", "--profile", "board", "--profile", "server", "--profile", "board"),
        ("search", "--profile", "board", "--profile", "board"),
        ("targets", "s", "--profile", "board", "--profile", "board"),
        ("targets", "s", "--profile", "local-cpu"),
    ],
)
def test_the_same_target_twice_is_refused(searched, call, command):
    code, _, err = call(*command, home=searched)
    assert code == 2 and "every target must be named once" in err


def test_a_plug_in_has_no_predictions_and_says_so(searched, call):
    code, _, err = call("search", "--teacher", "plugin:x:Y", "--profile", "board", "--profile", "server", home=searched)
    assert code == 2 and "none for modules of plug-ins" in err and "give one --profile" in err
    with pytest.raises(UsageError, match="plug-ins"):
        target_profiles.shape_of({"spec": {"teacher": "plugin:x:Y"}, "teacher": {"name": "Y", "digest": "0"}})


def test_another_teacher_of_that_name_is_refused(home):
    store = Store.open_study(home / "studies" / "s")
    store.set_meta(teacher={"name": "stdlib-coder", "digest": "f" * 16})
    with pytest.raises(UsageError, match="digest ffff"):
        add_targets(store, home, [load_profile("board", home)], 0.0)
    store.close()


def test_a_study_without_confirmed_candidates(tmp_path, call):
    write_profile(tmp_path, "board")
    Store.create(tmp_path / "studies" / "new", {"state": "new", "spec": {}}).close()
    code, _, err = call("targets", "new", "--profile", "board", home=tmp_path)
    assert code == 4 and "nothing can be priced" in err
    assert json.loads(call("targets", "new", "--json", home=tmp_path)[1])["targets"] == []


def test_a_profile_without_the_figures_is_refused_before_the_search(searched, call, monkeypatch):
    def lacks(profile, candidate, shape, **_):
        raise UsageError(f"the profile {profile.name} lacks bandwidth_gb_per_s", "add it with its source")

    monkeypatch.setattr(sys.modules["paretune.objectives.prediction.predict"], "predict", lacks)
    code, _, err = call("search", "--profile", "local-cpu", "--profile", "board", "--dry-run", home=searched)
    assert code == 2 and "board lacks bandwidth_gb_per_s" in err


def test_settings_without_targets_are_the_settings_of_before():
    plain = Spec()
    assert plain.targets == () and plain.digest() == Spec(targets=()).digest()
    old = {k: v for k, v in plain.model_dump(mode="json").items() if k != "targets"}
    assert Spec.model_validate(old).digest() == plain.digest() != Spec(targets=("board",)).digest()


def test_the_report_and_the_picture_tell_measured_from_predicted(searched):
    view = view_of(searched)
    page = report_html(view)
    assert page.count('id="targets"') == 1 and "Regret within 3% loss" in page and page.count("<h2>Targets</h2>") == 1
    figure = targets_figure(compared(view))
    bars = {t.name: t for t in figure.data if t.type == "bar"}
    assert bars["regret, measured"].marker.pattern.shape == "" and bars["regret, predicted"].marker.pattern.shape == "/"
    assert set(bars["regret, measured"].x) == {0} and set(bars["regret, predicted"].x) == {1, 2, 3}
    assert len(bars["regret, measured"].x) + len(bars["regret, predicted"].x) == 16
    lines = [t for t in figure.data if t.type == "scatter"]
    members = {t.name.split(" (")[0]: t for t in lines if t.mode == "markers"}
    assert not any("open" in s for s in members["local-cpu"].marker.symbol)
    assert all("open" in s for name in ("board", "server", "small") for s in members[name].marker.symbol)
    dashes = [t.line.dash for t in lines if t.mode == "lines"]
    assert dashes == ["solid", "dot", "dot", "dot"]


def test_mlflow_gets_the_table_and_the_picture(searched, tmp_path):
    view = view_of(searched)
    _write_files(view, tmp_path)
    found = json.loads((tmp_path / "targets.json").read_text())
    assert len(found["data"]) == 4 * len(view.confirmed) and all(len(r) == len(found["columns"]) for r in found["data"])
    assert {r[found["columns"].index("provenance")] for r in found["data"]} == {"measured", "predicted", "infeasible"}
    assert "Plotly" in (tmp_path / "targets.html").read_text()


class FakeLane:
    """Measures twice what is predicted; some visits are disturbed, one candidate is refused, the engine may be gone."""

    def __init__(self, disturbed=(), refused=(), gone_after=99, kept=()):
        self.disturbed, self.refused, self.gone_after, self.kept_keys, self.visits = (
            disturbed,
            refused,
            gone_after,
            kept,
            [],
        )

    def row(self, candidate):
        found = predict(detected_profile(), candidate, SHAPE)
        return TargetRow(
            {
                n: Measurement(2 * m.value, m.unit, 1.9 * m.value, 2.1 * m.value, "measured", 9, fingerprint())
                for n, m in found.items()
            }
        )

    def kept(self, candidate):
        return self.row(candidate) if candidate.key in self.kept_keys else None

    def measure(self, candidate, _artifact):
        if len(self.visits) >= self.gone_after:
            raise EnvironmentProblem("the engine is gone", "")
        self.visits.append(candidate.key)
        if candidate.key in self.refused:
            raise Infeasible("the engine refused op X", "")
        return None if candidate.key in self.disturbed else self.row(candidate)


@pytest.fixture
def at_hand(home, monkeypatch):
    """`measure(lane, seconds)`: add the board as if it were at hand, and return the view and the target."""
    monkeypatch.setattr(targets, "can_measure", lambda profile: profile.name == "board")

    def measure(benchmark, seconds=60.0):
        store = Store.open_study(home / "studies" / "s")
        try:
            (found,) = add_targets(
                store, home, [load_profile("board", home)], seconds, open_measurer=lambda _: benchmark
            )
            view = load_view(store)
        finally:
            store.close()
        assert next(t for t in view.targets if t.name == "board") == found
        return view, found

    return measure


def test_at_hand_the_members_of_all_fronts_are_measured(at_hand):
    benchmark = FakeLane()
    view, board = at_hand(benchmark)
    fronts = {p.key for p in view.front} | {p.key for t in view.targets for p in view_on(view, t).front}
    assert set(benchmark.visits) >= fronts and len(set(benchmark.visits)) == len(benchmark.visits)
    assert {k for k, r in board.rows.items() if r.is_measured} == set(benchmark.visits)
    assert "measured" in {r.measurements[DECODE].provenance for r in board.rows.values()} and not board.notes
    for key, row in board.rows.items():
        want = predict(detected_profile(), view.point(key).candidate, SHAPE)[DECODE].value
        assert row.measurements[DECODE].value == pytest.approx(2 * want), "predictions follow what was measured"
    again = FakeLane()
    assert at_hand(again)[1].rows == board.rows and again.visits == []


def test_without_time_nothing_is_measured_and_that_is_said(at_hand):
    benchmark = FakeLane()
    _, board = at_hand(benchmark, seconds=0.0)
    assert benchmark.visits == [] and board.measured == 0 and "for want of time" in board.notes[0]


def test_a_disturbed_visit_leaves_the_prediction(at_hand):
    first = at_hand(probe := FakeLane(gone_after=1))[1]
    assert first.measured == 1 and "the engine is gone" in first.notes[0]
    benchmark = FakeLane(disturbed=set("no key"))
    benchmark.disturbed = AllBut(probe.visits)
    _, board = at_hand(benchmark)
    assert board.measured == 1 and len(benchmark.visits) == targets.MOST_DISTURBED
    for key in benchmark.visits:
        assert board.rows[key].measurements[DECODE].provenance == "predicted"
    assert f"{targets.MOST_DISTURBED} visits were disturbed" in board.notes[0]
    assert {m.provenance for r in board.rows.values() for m in r.measurements.values()} == {"measured", "predicted"}


def compared(view: StudyView) -> Comparison:
    found = compare(view)
    assert found is not None
    return found


class AllBut:
    """Contains every key but some."""

    def __init__(self, keys):
        self.keys = set(keys)

    def __contains__(self, key):
        return key not in self.keys


def test_what_the_engine_refuses_cannot_run_there(at_hand):
    refused = FakeLane()
    key = at_hand(FakeLane(gone_after=1))[0].targets[0]
    refused.refused = {k for k, r in key.rows.items() if not r.is_measured}
    view, board = at_hand(refused)
    assert board.infeasible and set(board.infeasible) <= refused.refused
    assert set(board.infeasible.values()) == {"the engine refused op X"}
    side = compared(view).side("board")
    assert all(side.costs[k] == INFEASIBLE for k in board.infeasible)


def test_kept_latencies_take_no_time(at_hand, home):
    view = view_of(home)
    keys = {p.key for p in view.confirmed}
    benchmark = FakeLane(kept=keys)
    _, board = at_hand(benchmark, seconds=0.0)
    assert benchmark.visits == [] and board.measured == len(keys) and not board.notes


class OnlyTimes(FakeLane):
    """Kept files know latencies alone."""

    def kept(self, candidate):
        row = super().kept(candidate)
        return row and TargetRow({n: m for n, m in row.measurements.items() if n != "peak_memory_bytes"})


def test_kept_latencies_without_the_rest_do_not_stop_a_visit(at_hand, monkeypatch, home):
    """Without figures in the profile nothing is predicted beside them, and a row without memory has no place."""

    def unknown(*_):
        raise UsageError("the profile lacks its bandwidth", "")

    keys = {p.key for p in view_of(home).confirmed}
    monkeypatch.setattr(targets, "is_at_hand", lambda _profile: True)
    monkeypatch.setattr(targets, "roofline", lambda _turn: unknown)
    benchmark = OnlyTimes(kept=keys)
    view, board = at_hand(benchmark)
    assert benchmark.visits and all("peak_memory_bytes" in row.measurements for row in board.rows.values())
    found = answer_on(view, "board", home)
    assert found.kept and {p.key for p in found.view.confirmed} == set(benchmark.visits), "measured in part, and used"


def test_an_engine_that_refuses_the_profile_ends_its_target_alone(at_hand):
    class Refusing(FakeLane):
        def measure(self, _candidate, _artifact):
            raise UsageError("the engine torch runs on CPU or CUDA", "correct the profile")

    _, board = at_hand(Refusing())
    assert board.measured == 0 and "the engine torch runs on" in " ".join(board.notes) and board.rows


def test_a_kept_target_is_found_by_its_file(searched):
    path = searched / "profiles" / "board.yaml"
    assert answer_on(view_of(searched), str(path), searched).kept


def test_the_first_profile_must_be_measurable(searched, call):
    code, _, err = call("search", "--profile", "board", "--dry-run", home=searched)
    assert code == 2 and "board is only predicted here" in err and "--profile local-cpu --profile board" in err
    code, _, err = call("search", "--profile", "raspberry-pi-5", "--dry-run", home=searched)
    assert code == 2 and "raspberry-pi-5 is only predicted here" in err
    there = load_profile("board", searched).model_copy(update={"agent": "http://board:7411"})
    target_profiles.require_measurable(there)
    target_profiles.require_measurable(load_profile("board", searched), "10.0.0.1:6379")


def test_an_objective_needs_its_figure_of_every_target(searched, call, tmp_path):
    (tmp_path / "spec.yaml").write_text("objectives: [nll, usd_per_million_tokens]\n")
    sources = dict.fromkeys(("bandwidth_gb_per_s", "peak_fp32_tflops", "price_usd_per_hour"), "made up")
    write_profile(searched, "priced", at_hand=True, price_usd_per_hour=1.0, sources=sources)
    command = ("search", str(tmp_path / "spec.yaml"), "--profile", "priced", "--dry-run", "--profile")
    code, _, err = call(*command, "server", home=searched)
    assert code == 2 and "price_usd_per_hour" in err and "server" in err


def test_a_cell_of_which_one_side_is_unknown_is_not_measured(searched):

    comparison = compared(view_of(searched))
    known = next(p.key for p in comparison.view.front)
    regret: Any = SimpleNamespace(choices={"local-cpu": known, "board": None})
    assert comparison.origin(regret, "board", "local-cpu") == "predicted"
    regret.choices["board"] = known
    assert comparison.origin(regret, "board", "local-cpu") == "measured"


def test_an_engine_that_is_not_installed_leaves_predictions():
    away: Any = SimpleNamespace(at_hand=True, agent=None, engine="openvino-of-another-world")
    assert target_profiles.missing_engine(away) == away.engine and not target_profiles.can_measure(away)
    away.engine = "torch"
    assert target_profiles.can_measure(away) and target_profiles.reserved_share([away] * 9) == 0.2
    away.agent = "http://board:7411"
    assert not target_profiles.can_measure(away), "the lane of a further target is this machine's"
    away.agent = None
    away.at_hand = False
    assert not target_profiles.can_measure(away) and target_profiles.reserved_share([away]) == 0.0


def test_predictions_tie_only_where_the_priors_do_not_decide(searched):
    """Their intervals overlap nearly always, because all share the same priors."""
    view = view_of(searched)
    there = view_on(view, view.targets[1])
    slow, fast = (f(there.confirmed, key=lambda p: p.measurements[DECODE].value) for f in (max, min))
    close = sorted(there.confirmed, key=lambda p: p.measurements[DECODE].value)[:2]
    assert close[0].measurements[DECODE].overlaps(close[1].measurements[DECODE])
    assert not tied(slow, fast, DECODE)
    assert close[0].measurements[DECODE].value == close[1].measurements[DECODE].value or not tied(
        close[0], close[1], DECODE
    )
    assert tied(fast, fast, DECODE)


def test_a_kept_target_that_misses_a_candidate_is_not_used(searched):
    view = view_of(searched)
    board = view.targets[0]
    short = {k: r for k, r in board.rows.items() if k != view.front[0].key}
    from dataclasses import replace

    cut = replace(view, targets=(replace(board, rows=short), *view.targets[1:]))
    assert answer_on(view, "board", searched).kept
    found = answer_on(cut, "board", searched, predict)
    assert not found.kept and len(found.view.confirmed) == len(view.confirmed)


class OneVisit:
    """A lane that answers at once."""

    def __init__(self, stable):
        self.stable = stable

    def measure(self, _model):
        from paretune.objectives.latency.benchmark import LatencyResult

        values = {DECODE: 0.5, "ttft_ms": 4.0, "peak_memory_bytes": 3e7}
        kind: Provenance = "measured" if self.stable else "disturbed"
        return LatencyResult({n: Measurement(v, "x", v, v, kind, 9, "f") for n, v in values.items()}, self.stable)


def test_visits_are_kept_per_threads_and_only_if_quiet(searched, tmp_path):
    from paretune.common.checksums import MODEL
    from paretune.search.targets.benchmark import TargetBenchmark
    from paretune.teachers.checkpoint.teacher import load_teacher

    candidate = view_of(searched).front[0].candidate
    profile, teacher = load_profile("board", searched), load_teacher("stdlib-coder")

    def benchmark(threads, stable=True):
        found = TargetBenchmark(tmp_path, tmp_path, profile.model_copy(update={"threads": threads}), teacher)
        lane: Any = OneVisit(stable)
        found._visits._lane = lane
        return found

    with pytest.raises(EnvironmentProblem, match="is gone"):
        benchmark(2).measure(candidate, tmp_path)
    (tmp_path / MODEL).parent.mkdir()
    (tmp_path / MODEL).write_bytes(b"")
    assert benchmark(2, stable=False).measure(candidate, tmp_path) is None and benchmark(2).kept(candidate) is None
    row = benchmark(2).measure(candidate, tmp_path)
    assert row.is_measured and row.measurements["peak_memory_bytes"].value == 3e7
    kept = benchmark(2).kept(candidate)
    assert kept.is_measured and set(kept.measurements) == {DECODE, "ttft_ms", "throughput_tokens_per_s"}
    assert kept.measurements[DECODE] == row.measurements[DECODE]
    assert benchmark(1).kept(candidate) is None


def test_one_missing_artifact_costs_that_candidate_only(tmp_path, monkeypatch):
    """The rest of the target is measured; if the next one says the same, it is the engine's problem and ends the target."""
    module = targets
    seen = []

    def visit(_store, _lane, point):
        seen.append(point.key)
        if len(seen) == 1:
            raise UsageError(f"{point.name} has no artifact", "")
        return TargetRow({})

    points = [SimpleNamespace(key=key, name=f"name {key}") for key in ("a", "b", "c")]
    store: Any = None
    lane: Any = None
    view: Any = SimpleNamespace(confirmed=points)
    job: Any = SimpleNamespace(measured={}, predicted={}, notes=[], seconds=0.0, target=lambda: None)
    monkeypatch.setattr(module, "_visit", visit)
    monkeypatch.setattr(module, "_wanted", lambda *_: iter(["a", "b", "c"]))
    monkeypatch.setattr(module, "keep_targets", lambda *_: None)
    assert module._visits(store, view, job, lane, time.monotonic() + 1000) == 0
    assert seen == ["a", "b", "c"] and set(job.measured) == {"b", "c"}
    assert job.notes == ["name a is left predicted: name a has no artifact"]

    def refuse(*_):
        raise UsageError("the engine is gone", "")

    monkeypatch.setattr(module, "_visit", refuse)
    job.measured.clear()
    with pytest.raises(UsageError, match="the engine is gone"):
        module._visits(store, view, job, lane, time.monotonic() + 1000)
