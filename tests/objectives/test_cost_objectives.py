"""Throughput, energy, cost and memory as measurements, objectives and limits; and what a kept measurement depends on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.common.errors import UsageError
from paretune.hardware_profiles.profile import Profile, detected_profile
from paretune.objectives.directions import excess, minimized
from paretune.objectives.energy import energy_and_cost, following, throughput
from paretune.objectives.latency import measurement_key
from paretune.objectives.latency.workload import STANDARD
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import DECODER, forward_measurements
from paretune.objectives.prediction.memory_fit import MemoryFit, resident_bytes
from paretune.search.estimation.derived_metrics import check_device_specs
from paretune.search.evaluators.measuring import Measuring
from paretune.search.evaluators.simulated import SHAPE, SimulatedEvaluator, VirtualClock
from paretune.search.execution.inline import run_inline
from paretune.search.execution.run import run_study
from paretune.search.front import dominates
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.recommend.recommend import Limits, recommend
from paretune.search.spec import Spec, make_spec
from paretune.search.study.view import StudyView, label_of, load_view
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import load_teacher
from paretune.tracking.charts.points import menu_axes, staircase, title
from paretune.tracking.wording import plain
from support.plans import empty_plan

DECODE = Measurement(2.0, "ms/token", 1.9, 2.2, "measured", 24, "machine", "n")
NEW = ("throughput_tokens_per_s", "energy_j_per_token", "usd_per_million_tokens")


def profile(**changes: Any) -> Profile:
    given: dict[str, Any] = {"power_watts": 30.0, "price_usd_per_hour": 0.9, **changes}
    if "sources" in Profile.model_fields:
        given["sources"] = {"power_watts": "a test", "price_usd_per_hour": "a test"}
    data = detected_profile().model_dump()
    return Profile.model_validate({**data, **given})


def test_energy_and_cost_by_hand() -> None:
    """30 W for 2 ms are 60 mJ; 0.9 USD/h for 2,000 s (a million tokens of 2 ms) are 0.5 USD."""
    found = energy_and_cost(DECODE, profile())
    energy, cost = found["energy_j_per_token"], found["usd_per_million_tokens"]
    assert (energy.value, energy.low, energy.high) == pytest.approx((0.06, 0.057, 0.066))
    assert (cost.value, cost.low, cost.high) == pytest.approx((0.5, 0.475, 0.55))
    assert energy.unit == "J/token" and energy.provenance == "predicted", "power times time is never measured"
    assert cost.provenance == "measured" and "30 W" in energy.note and "0.9 USD/h" in cost.note


def test_energy_and_cost_count_devices_and_stay_away_without_figures() -> None:
    several = energy_and_cost(DECODE, SimpleNamespace(power_watts=300.0, price_usd_per_hour=2.0), 4)  # type: ignore[arg-type]
    assert several["energy_j_per_token"].value == pytest.approx(2.4)
    assert several["usd_per_million_tokens"].value == pytest.approx(8 / 3600 * 2000)
    bare = profile(power_watts=None, price_usd_per_hour=None)
    assert energy_and_cost(DECODE, bare) == {} and following(DECODE, bare).keys() == {"throughput_tokens_per_s"}


@pytest.mark.parametrize("provenance", ["predicted", "disturbed"])
def test_what_follows_is_no_surer_than_the_time(provenance: Any) -> None:
    found = following(dataclasses.replace(DECODE, provenance=provenance), profile())
    assert {m.provenance for m in found.values()} == {provenance}


def test_throughput_counts_the_batch_and_stays_finite() -> None:
    four = throughput(DECODE, 4)
    assert (four.value, four.low, four.high) == pytest.approx((2000, 4000 / 2.2, 4000 / 1.9))
    wild = throughput(dataclasses.replace(DECODE, low=-1.0))
    assert math.isfinite(wild.high) and wild.low <= wild.value <= wild.high


def test_a_module_has_no_tokens() -> None:
    found = forward_measurements(
        {"decode_ms_per_token": DECODE, "ttft_ms": DECODE, "throughput_tokens_per_s": throughput(DECODE)}
    )
    assert found.keys() == {"forward_ms"}


positive = st.floats(1e-3, 1e6)


@given(positive, positive, positive, positive)
def test_more_throughput_dominates_and_ratios_stay_ratios(a: float, b: float, x: float, y: float) -> None:
    name = "throughput_tokens_per_s"
    first, second = ((minimized(name, rate), minimized("nll", loss)) for rate, loss in ((a, x), (b, y)))
    assert dominates(first, second) == (a >= b and x <= y and (1 / a < 1 / b or x < y))
    assert first[0] / second[0] == pytest.approx(b / a), "twice the tokens per second is half of what is minimized"
    assert minimized(name, minimized(name, a)) == pytest.approx(a) and minimized("bytes", a) == a
    if a != pytest.approx(b):
        assert (excess(name, a, b) <= 0) == (a >= b) and (excess("bytes", a, b) <= 0) == (a <= b)
    assert excess("bytes", a, b) == pytest.approx(a / b - 1) and excess(name, a, b) == pytest.approx(b / a - 1)


# memory before it is measured


def test_the_memory_line_is_found_and_its_error_is_held_out() -> None:
    sizes = [2e6, 5e6, 11e6, 23e6]
    fit = MemoryFit([(x, 3e6 + 1.4 * x) for x in sizes])
    found = fit.predict(8e6)
    assert found.value == pytest.approx(3e6 + 1.4 * 8e6, rel=1e-3) and found.provenance == "predicted"
    assert fit.error == 0.1, "no less than a tenth, however straight the line"
    bent = MemoryFit([(x, (3e6 + 1.4 * x) * f) for x, f in zip(sizes, (1, 1.5, 0.8, 1), strict=True)])
    assert bent.error > 0.2
    assert MemoryFit([(1e6, 4e6)]).error == 0.5 and MemoryFit([(1e6, 4e6)]).predict(1e6).value == pytest.approx(4e6)
    with pytest.raises(ValueError, match="at least 1"):
        MemoryFit([])


def test_weights_stored_in_16_bits_are_counted_as_what_they_become() -> None:
    """The fp16 teacher's file is half of fp32's, its matrices in memory are as large. By hand over all matrices."""
    half, int8 = Format(16, 0, "fp32"), Format(8, 32, "int8")

    def whole(form: Format) -> Candidate:
        return Candidate((Layer(SHAPE.ffn, SHAPE.kv_heads, form, form),) * SHAPE.layers, form)

    h = SHAPE.hidden
    layer = 2 * h * SHAPE.head_dim * (SHAPE.heads + SHAPE.kv_heads) + 3 * h * SHAPE.ffn
    matrices = SHAPE.layers * layer + SHAPE.vocab * h
    assert half.kernel == "fp16/fp32"
    assert resident_bytes(whole(half), SHAPE, 2.0 * matrices) == 4.0 * matrices
    assert resident_bytes(whole(int8), SHAPE, 123.0) == 123.0


# a whole simulated search with them


def ready(home: Path, target: Profile, **options: Any) -> Ready:
    spec = Spec.model_validate({"budget": "300s", "fit_points": 30, **options})
    check_device_specs(spec, target)
    space = Space.of(SHAPE, target.weight_formats)
    plan = empty_plan(space, spec)
    return Ready(spec, load_teacher("stdlib-coder"), target, space, plan)


def searched(home: Path, target: Profile, **options: Any) -> StudyView:
    made = ready(home, target, **options)
    store, clock = create_study(made, home, "s", "x"), VirtualClock()
    evaluator = SimulatedEvaluator(store.folder, home, clock)

    def execute(director: Any, *_: Any) -> None:
        director.state.budget.clock = clock
        director.state.budget.__post_init__()
        run_inline(director, evaluator.run)

    assert run_study(store, made, home, lambda *_: None, None, execute) == 0
    view = load_view(store)
    store.close()
    return view


OBJECTIVES = ["nll", "throughput_tokens_per_s", "peak_memory_bytes", "energy_j_per_token"]


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return searched(
        tmp_path_factory.mktemp("home"),
        profile(),
        objectives=OBJECTIVES,
        limits={"throughput_tokens_per_s": 400, "usd_per_million_tokens": 0.7},
    )


def test_the_front_maximizes_throughput(view: StudyView) -> None:
    """An obvious check of dominance in natural directions, over all confirmed points."""

    def beats(a: Any, b: Any) -> bool:
        signs = {"throughput_tokens_per_s": -1}
        pairs = [(signs.get(n, 1) * a.value(n).value, signs.get(n, 1) * b.value(n).value) for n in OBJECTIVES]
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    front = {p.key for p in view.confirmed if not any(beats(q, p) for q in view.confirmed)}
    assert {p.key for p in view.front} == front and len(front) > 3
    fastest = max(view.confirmed, key=lambda p: p.measurements["throughput_tokens_per_s"].value)
    assert fastest.key in front


def test_rung_0_predicts_them_and_memory_comes_near(view: StudyView) -> None:
    """The simulator's memory is the file's size, so the line through the baselines is exact; the times are the fit's."""
    assert len(view.rung0) > 20
    for point in view.rung0:
        m = point.measurements
        assert all(m[name].provenance == "predicted" for name in (*NEW, "peak_memory_bytes"))
        assert m["peak_memory_bytes"].value == pytest.approx(m["bytes"].value, rel=0.02)
        decode = m["decode_ms_per_token"].value
        assert m["throughput_tokens_per_s"].value == pytest.approx(1e3 / decode)
        assert m["energy_j_per_token"].value == pytest.approx(30 * decode / 1e3)
    confirmed = view.confirmed[0].measurements
    assert confirmed["throughput_tokens_per_s"].provenance == "measured"
    assert confirmed["energy_j_per_token"].provenance == "predicted"


def test_a_least_throughput_is_a_limit_of_the_search(view: StudyView) -> None:
    recovered = [p for p in view.confirmed if p.source != "baseline"]
    assert recovered and all(p.measurements["throughput_tokens_per_s"].value >= 0.95 * 400 for p in recovered)
    assert all(p.measurements["usd_per_million_tokens"].value <= 1.05 * 0.7 for p in recovered)


def test_recommendations_keep_the_new_limits(view: StudyView) -> None:
    free = dataclasses.replace(view, meta={**view.meta, "spec": {}})
    rates = sorted(p.measurements["throughput_tokens_per_s"].value for p in view.front)
    least = (rates[-2] + rates[-1]) / 2
    found = recommend(free, Limits(throughput=least))
    assert found.chosen.measurements["throughput_tokens_per_s"].value == rates[-1] and found.considered == 1
    assert found.binding == "throughput_tokens_per_s"
    assert any("tokens/s" in sentence and "% room" in sentence for sentence in found.why)
    with pytest.raises(Exception, match=r"throughput_tokens_per_s is .* tokens/s, the limit"):
        recommend(free, Limits(throughput=2 * rates[-1]))
    joules = sorted(p.measurements["energy_j_per_token"].value for p in view.front)
    frugal = recommend(free, Limits(energy_j=joules[1])).chosen
    assert frugal.measurements["energy_j_per_token"].value <= joules[1]
    dollars = min(p.measurements["usd_per_million_tokens"].value for p in view.front)
    with pytest.raises(Exception, match="USD per million tokens, the limit"):
        recommend(free, Limits(cost_usd=dollars / 2))
    balanced = recommend(free, Limits()).chosen
    assert balanced.measurements["throughput_tokens_per_s"].value > rates[0], "the slowest is no balance"


def test_a_limit_on_what_was_not_measured_is_said(tmp_path: Path) -> None:
    bare = searched(tmp_path, profile(power_watts=None, price_usd_per_hour=None), budget="200s")
    with pytest.raises(UsageError, match="no energy_j_per_token: its profile has no power_watts"):
        recommend(bare, Limits(energy_j=1.0))
    assert recommend(bare, Limits(throughput=1.0)).chosen in bare.front


def test_charts_and_labels_know_them(view: StudyView) -> None:
    for name in (*NEW, "peak_memory_bytes"):
        assert label_of(name, DECODER) != name and "(" in title(name)
        assert (name, "nll") in menu_axes(view)
    assert (
        plain("throughput_tokens_per_s", 512.25) == "512.2 tokens/s"
        and plain("energy_j_per_token", 0.06) == "0.06 J/token"
    )
    corners = staircase(view, "throughput_tokens_per_s", "nll")
    assert len(corners) > 1
    assert all(b[0] < a[0] and b[1] < a[1] for a, b in itertools.pairwise(corners)), "fastest first, then better"


@pytest.mark.parametrize("name", ["energy_j_per_token", "usd_per_million_tokens"])
def test_a_figure_that_the_profile_lacks_is_refused_before_work(name: str) -> None:
    bare = profile(power_watts=None, price_usd_per_hour=None)
    for spec in (Spec(objectives=("nll", name)), Spec(limits={name: 1.0})):
        with pytest.raises(UsageError, match=f"{name} needs (power_watts|price_usd_per_hour)"):
            check_device_specs(spec, bare)
        check_device_specs(spec, profile())
    with pytest.raises(UsageError, match="more than 0"):
        check_device_specs(Spec(objectives=("nll", "usd_per_million_tokens")), profile(price_usd_per_hour=0.0))


def test_unknown_objectives_and_limits_are_refused() -> None:
    for bad in ({"objectives": ["nll", "speed"]}, {"limits": {"speed": 1.0}}, {"limits": {"energy_j_per_token": 0}}):
        with pytest.raises(UsageError):
            make_spec(None, "quick", bad)


# what a kept measurement depends on

INT4, INT8 = Format(4, 32, "int8"), Format(8, 32, "int8")


def of(form: Format = INT4, pattern: Pattern | None = None, ffn: int = 512) -> Candidate:
    return Candidate((Layer(ffn, 4, form, form, pattern or Pattern()),) * 4, form)


def kept(tmp_path: Path, candidate: Candidate, shape: Shape = SHAPE, machine: str = "m1", **changes: Any) -> Path:
    """Where a worker of a study keeps the time of a candidate. The teacher's digest stands for its weights' values."""
    target = profile(**changes)
    space = SimpleNamespace(
        teacher=SimpleNamespace(shape=shape, context=2048, digest=str(np.random.default_rng().random())),
        profile=target,
        fingerprint=machine,
        cache=tmp_path,
        folder=tmp_path,
        lock=None,
    )
    return Measuring(space).kept_file(candidate)  # type: ignore[arg-type]


def test_other_weights_hit(tmp_path: Path) -> None:
    base = kept(tmp_path, of())
    assert kept(tmp_path, of()) == base, "the weights' values are not in the key"
    assert kept(tmp_path, of(dataclasses.replace(INT4, algorithm="gptq"))) == base
    assert kept(tmp_path, of(pattern=Pattern("2:4", 0.5, "wanda"))) == base, "no kernel exploits it"
    assert kept(tmp_path, of(), power_watts=99.0) == base


@pytest.mark.parametrize(
    "changed",
    [
        {"candidate": of(ffn=448)},
        {"candidate": of(INT8)},
        {"shape": dataclasses.replace(SHAPE, hidden=512)},
        {"shape": dataclasses.replace(SHAPE, vocab=8192)},
        {"machine": "m2"},
        {"threads": 2},
        {"name": "cpu-1-thread"},
        {"engine": "openvino"},
        {"execution_provider": "CUDAExecutionProvider"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_shape_precision_machine_thread_count_or_engine_misses(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert kept(tmp_path, **{"candidate": of(), **changed}) != kept(tmp_path, of())


def test_another_engine_version_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed version counts, not what an old profile file says."""
    base = kept(tmp_path, of())
    assert kept(tmp_path, of(), engine_version="0.1") == base
    monkeypatch.setattr(measurement_key, "package_version", lambda name: f"{name} 99")
    assert kept(tmp_path, of()) != base


@pytest.mark.parametrize("name", ["PROMPT", "NEW_TOKENS"])
def test_another_prompt_batch_or_length_misses(name: str) -> None:
    target = profile()
    standard = measurement_key.target_key(target, "m")
    turn = STANDARD
    field = {"PROMPT": "prompt", "NEW_TOKENS": "tokens"}[name]
    changed = [dataclasses.replace(turn, **{field: 64}), dataclasses.replace(turn, batch=4)]
    assert len({standard, *(measurement_key.target_key(target, "m", t) for t in changed)}) == 3


def test_a_pattern_counts_where_a_kernel_exploits_it(tmp_path: Path) -> None:
    exploits: dict[str, Any] = {"sparse_patterns": ("2:4",)}
    dense = kept(tmp_path, of(), **exploits)
    sparse = kept(tmp_path, of(pattern=Pattern("2:4", 0.5, "wanda")), **exploits)
    assert sparse != dense
    assert kept(tmp_path, of(pattern=Pattern("2:4", 0.5, "magnitude")), **exploits) == sparse, (
        "who chose the zeros is no matter"
    )
    assert kept(tmp_path, of(pattern=Pattern("unstructured", 0.5, "wanda")), **exploits) == dense


def test_the_fingerprint_of_a_measurement_names_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_runtime = measurement_key.engine_fingerprint(profile(), "abc")
    assert plain_runtime == "abc", "the machine's own fingerprint holds ONNX Runtime's version"
    monkeypatch.setattr(measurement_key, "package_version", lambda _name: "1")
    one = measurement_key.engine_fingerprint(profile(engine="openvino"), "abc")
    monkeypatch.setattr(measurement_key, "package_version", lambda _name: "2")
    two = measurement_key.engine_fingerprint(profile(engine="openvino"), "abc")
    assert len({plain_runtime, one, two}) == 3 and len(one) == 12


def test_a_key_is_one_folder_name(tmp_path: Path) -> None:
    odd = measurement_key.target_key(profile(engine="vitis", engine_version="3.5/../x y"), "m")
    assert "/" not in odd and " " not in odd
    assert json.dumps(odd)
