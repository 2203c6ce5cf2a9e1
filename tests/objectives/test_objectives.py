"""Quality with its intervals, the latency fit against a known law, and the lane on quiet, drifting and busy machines."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.common.errors import EnvironmentProblem, Infeasible
from paretune.compression.export.graph import build_model, save_model
from paretune.hardware_profiles import MachineLock
from paretune.objectives.latency import benchmark as lane_module
from paretune.objectives.latency import workload as turns_module
from paretune.objectives.latency.benchmark import LATENCIES, LatencyBenchmark, Nominal
from paretune.objectives.latency.intervals import moderated_interval, odd_ones
from paretune.objectives.measurement import Measurement
from paretune.objectives.prediction.latency_fit import MIN_POINTS, LatencyFit, features, params_times_bits, terms
from paretune.objectives.quality.quality import Scores, paired_difference, quality_measurements, sum_by_document
from paretune.spaces import Candidate, Format, Layer, Shape, Space
from paretune.spaces.kinds import AnyCandidate
from paretune.teachers.checkpoint.teacher import Teacher
from support.decoders import decoder_design

KERNELS = ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32")
SHAPE = Shape(6, 256, 768, 8, 4, 32, 4096)
SPACE = Space.of(SHAPE, KERNELS)
LARGE = replace(SHAPE, vocab=16_000)  # its head alone is as large in fp32 as a cache


def scores(seed: int, shift: float = 0.0, documents: int = 20, noise: float = 0.3) -> Scores:
    """Documents of different length and difficulty (the same for every seed), with noise of their own."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    targets = common.integers(50, 500, documents)
    difficulty = common.normal(2.5, 0.6, documents)
    nll = (difficulty + shift + own.normal(0, noise, documents) / 10) * targets
    return Scores(tuple(f"d{i}" for i in range(documents)), tuple(nll.tolist()), tuple(targets.tolist()))


def test_the_difference_of_identical_scores_is_exactly_zero() -> None:
    assert paired_difference(scores(1), scores(1)) == (0.0, 0.0, 0.0)


def test_the_paired_difference_is_the_slow_bootstrap() -> None:
    mine, other = scores(1, 0.05), scores(2)
    value, low, high = paired_difference(mine, other)
    slow = sum(a - b for a, b in zip(mine.nll, other.nll, strict=True)) / sum(mine.targets)
    assert value == pytest.approx(slow)
    assert value == pytest.approx(mine.mean_nll - other.mean_nll)
    generator, drawn = np.random.default_rng(123), []  # another stream: agreement within the bootstrap's own error
    for _ in range(4000):
        picks = generator.integers(0, 20, 20)
        drawn.append(sum(mine.nll[i] - other.nll[i] for i in picks) / sum(mine.targets[i] for i in picks))
    width = high - low
    assert low == pytest.approx(float(np.quantile(drawn, 0.025)), abs=0.12 * width)
    assert high == pytest.approx(float(np.quantile(drawn, 0.975)), abs=0.12 * width)
    assert low < value < high


def test_pairing_narrows_the_interval_and_intervals_cover() -> None:
    """Documents differ far more than models do. 60 draws of a true difference of 0.02: with 95 % intervals at least 48 cover it
    (fixed seeds; by chance fewer would happen with a probability below 1e-4 even at 90 % coverage)."""
    _, low, high = paired_difference(scores(1, 0.02), scores(2))
    nll = quality_measurements(scores(1, 0.02), scores(2), 3.0, "f")["nll"]
    assert high - low < (nll.high - nll.low) / 5
    covered = sum(
        low <= 0.02 <= high
        for low, high in (paired_difference(scores(2 * i, 0.02), scores(2 * i + 1))[1:] for i in range(60))
    )
    assert covered >= 48


def test_different_texts_cannot_be_compared() -> None:
    for other in (
        replace(scores(1), documents=tuple(f"e{i}" for i in range(20))),
        scores(1, documents=19),
        replace(scores(1), targets=(*scores(1).targets[:-1], 7)),
    ):
        with pytest.raises(ValueError, match="same documents"):
            paired_difference(scores(1), other)


def test_quality_measurements_are_their_definitions() -> None:
    mine = replace(
        scores(1, 0.1), kl=tuple([2.0, 0.0] * 10), agree=tuple([30.0, 0.0] * 10), reference_targets=tuple([40, 0] * 10)
    )
    teacher = scores(2)
    found = quality_measurements(mine, teacher, 3.2, "print")
    nll = sum(mine.nll) / sum(mine.targets)
    base = sum(teacher.nll) / sum(teacher.targets)
    values = {
        "nll": nll,
        "nll_increase": nll - base,
        "relative_loss": (nll - base) / base,
        "perplexity": math.exp(nll),
        "bits_per_byte": nll / math.log(2) / 3.2,
        "kl": 20 / 400,
        "top1_agreement": 300 / 400,
    }
    assert found.keys() == values.keys()
    for name, measurement in found.items():
        assert measurement.value == pytest.approx(values[name]), name
        assert measurement.low <= measurement.value <= measurement.high, name
        assert (measurement.provenance, measurement.fingerprint) == ("measured", "print")
    assert found["kl"].samples == 400
    assert found["nll"].samples == sum(mine.targets)
    assert "kl" not in quality_measurements(scores(1), teacher, 3.2, "")
    assert Scores.from_dict(mine.__dict__) == mine


def test_documents_without_targets_change_nothing_and_one_document_has_no_interval() -> None:
    base = scores(1)
    padded = Scores((*base.documents, "empty"), (*base.nll, 0.0), (*base.targets, 0))
    assert paired_difference(padded, padded) == (0.0, 0.0, 0.0)
    assert quality_measurements(padded, padded, 3.0, "")["nll"].value == pytest.approx(base.mean_nll)
    one = scores(1, documents=1)
    found = quality_measurements(one, one, 3.0, "")["nll"]
    assert found.low == found.value == found.high


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 10)), max_size=20))
def test_sums_by_document_are_the_loop(rows: list[tuple[int, float]]) -> None:
    expected = [0.0] * 5
    for cluster, value in rows:
        expected[cluster] += value
    values = np.array([v for _, v in rows], np.float64)
    clusters = np.array([*(c for c, _ in rows), 3, 4], np.int64)  # values may cover the first windows only
    assert sum_by_document(values, clusters, 5) == pytest.approx(expected)


def test_measurements_survive_json_and_know_overlap() -> None:
    a = Measurement(1.0, "ms", 0.9, 1.1, "measured", 8, "abc", "note")
    assert Measurement.from_dict(a.to_dict()) == a
    assert a.overlaps(replace(a, low=1.1, high=2.0)) and replace(a, low=1.1, high=2.0).overlaps(a)
    assert not a.overlaps(replace(a, low=1.11, high=2.0))
    exact = Measurement.exact(5, "bytes")
    assert (exact.low, exact.high, exact.provenance) == (5, 5, "measured")


LAW = np.array(
    [
        *(0.05, 0.03),
        *(1.2, 0.4, 2.0, 0.3, 0.5, 0.7, 0.6, 0.25, 0.9),  # layers, by kernel
        *(1.1, 0.35, 1.9, 0.28, 0.45, 0.8, 0.5, 0.22, 0.8),  # head
        0.02,
    ]
)


def law(candidate: Candidate) -> float:
    return float(features(candidate, SHAPE) @ LAW)


def test_features_are_counted_by_hand() -> None:
    attention, ffn, head = Format(8, 32, "int8"), Format(4, 32, "fp32"), Format(4, 64, "int8")
    candidate = Candidate((Layer(320, 2, attention, ffn),) * 3, head, Format(8, 32))
    q, kv = 2 * 2 * 32, 2 * 32
    expected = dict.fromkeys(range(21), 0.0)
    expected[0], expected[1], expected[20] = 1, 3, 3 * kv / 1e3
    expected[3] = 3 * (2 * 256 * q + 2 * 256 * kv) / 1e6  # int8/int8 layers
    expected[6] = 3 * 3 * 256 * 320 / 1e6  # int4/fp32 layers
    expected[14] = 4096 * 256 / 1e6  # int4/int8 head
    assert features(candidate, SHAPE).tolist() == pytest.approx(list(expected.values()))
    assert params_times_bits(candidate, SHAPE) == pytest.approx(8 * expected[3] + 4 * expected[6] + 4 * expected[14])


def test_scales_and_what_a_cache_does_not_hold_are_terms() -> None:
    form = Format(4, 64, "int8")
    candidate = Candidate((Layer(320, 2, form, Format()), Layer(64, 1, Format(8, 0, "int8"), form)), form, form)
    found = terms(candidate, SHAPE)
    assert found[:-2].tolist() == features(candidate, SHAPE).tolist()
    first = (2 * 2 * 32 + 2 * 2 * 32) * (256 // 64) + 256 * (128 // 64)  # q, k, v; o
    second = (2 * 32 + 2 * 32) + 256 + 2 * 64 * (256 // 64) + 256 * (64 // 64)  # per channel; gate and up, down
    assert found[-2] == pytest.approx((first + second + 4096 * (256 // 64)) / 1e6)
    assert found[-1] == 0
    large = replace(SHAPE, vocab=20_000)
    assert terms(candidate, large)[-1] == 0
    plain = Candidate(candidate.layers, Format(), form)
    megabytes = (20_000 * 256 * 32 + 98_304 * 4 + 245_760 * 32 + 49_152 * 8 + 49_152 * 4) / 8e6
    assert terms(plain, large)[-1] == pytest.approx(megabytes - 16)


def test_the_fit_learns_that_a_cache_ends() -> None:
    """Models of which some are larger than the cache: the sum without that term misses them, the fit does not."""

    def beyond(candidate: Candidate) -> float:
        return law(candidate) + 0.4 * float(terms(candidate, LARGE)[-1])

    points = decoder_design(Space.of(LARGE, KERNELS), 60)
    assert 10 < sum(terms(c, LARGE)[-1] > 0 for c in points) < 50
    fit = LatencyFit("decode_ms_per_token", "ms/token", LARGE, [(c, beyond(c)) for c in points])
    assert fit.error.median < 1e-3 and fit.coefficients[-1] == pytest.approx(0.4, rel=1e-2)


def test_weights_stored_in_16_bits_cost_what_fp32_does_and_every_kernel_has_a_term() -> None:
    def counted(form: Format) -> list[float]:
        return list(features(Candidate((Layer(320, 2, form, form),) * 3, form, form), SHAPE))

    for half in (Format(16), Format(16, half="bf16")):
        assert counted(half) == counted(Format())
    every = [Format(8, 0, a) for a in ("int8", "fp32", "dynamic", "static")]
    every += [Format(b, 32, a) for b in (2, 4) for a in ("int8", "fp32")]
    assert len({tuple(counted(form)) for form in (*every, Format())}) == len(every) + 1


def test_the_fit_recovers_a_linear_law_and_says_predicted() -> None:
    fit = LatencyFit("decode_ms_per_token", "ms/token", SHAPE, [(c, law(c)) for c in decoder_design(SPACE, 40)])
    for candidate in decoder_design(SPACE, 60, seed=9):
        predicted = fit.predict(candidate)
        assert predicted.value == pytest.approx(law(candidate), rel=1e-3)
        assert predicted.provenance == "predicted"
    assert fit.error.median < 1e-3
    assert fit.error.kendall_tau == pytest.approx(1.0)
    assert fit.error.params_bits_tau < 0.95
    assert fit.error.points == 40
    assert (fit.coefficients >= 0).all()


def test_the_error_is_held_out_and_the_interval_follows_from_it() -> None:
    """With 10 % noise on 30 points a fit judged on its own points would look too good."""
    noise = np.random.default_rng(3)
    measured: list[tuple[AnyCandidate, float]] = [
        (c, law(c) * float(noise.lognormal(0, 0.1))) for c in decoder_design(SPACE, 30)
    ]
    fit = LatencyFit("ttft_ms", "ms", SHAPE, measured)
    own = np.median([abs(fit.predict(c).value / v - 1) for c, v in measured])
    assert own < fit.error.median <= fit.error.p95 <= fit.error.worst
    assert 0.03 < fit.error.median < 0.3
    fresh = decoder_design(SPACE, 80, seed=5)[3:]
    inside = sum(p.low <= law(c) <= p.high for c in fresh for p in [fit.predict(c)])
    assert inside >= 0.85 * len(fresh)
    predicted = fit.predict(fresh[0])
    assert predicted.low < predicted.value < predicted.high
    assert "held-out error" in predicted.note


def test_a_fit_of_too_few_points_is_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {MIN_POINTS} measurements, but got {MIN_POINTS - 1}"):
        LatencyFit("x", "ms", SHAPE, [(c, 1.0) for c in decoder_design(SPACE, 30)[: MIN_POINTS - 1]])


@pytest.mark.parametrize("space", [SPACE, Space.of(SHAPE, ("int8/int8", "int4/int8"))], ids=["cpu", "integers only"])
def test_the_design_holds_the_baselines_and_every_choice(space: Space) -> None:
    found = decoder_design(space, 36)
    assert len(found) == len({c.key for c in found}) == 36
    assert found[: len(space.baselines())] == space.baselines()
    assert not any(c.is_sparse for c in found)
    assert found == decoder_design(space, 36)
    assert found != decoder_design(space, 36, seed=1)
    depths = Counter(len(c.layers) for c in found)
    assert set(depths) == set(range(space.min_depth, 7))
    assert {c.layers[0].kv_groups for c in found} == set(range(space.min_kv_groups, 5))
    kernels = {f.kernel for c in found for f in (c.layers[0].attention_format, c.layers[0].ffn_format, c.head_format)}
    assert kernels == set(space.kernels)


class FakeChild:
    """An engine that answers from a table, on a machine whose speed drifts. No processes, no clock."""

    pid = os.getpid()
    speed = staticmethod(itertools.repeat(1.0).__next__)
    table: ClassVar = {"reference.onnx": (2.0, 30.0), "x.onnx": (1.0, 15.0)}

    def __init__(self, _threads: int, pinned: bool = False, engine: str = "onnxruntime") -> None:
        self.pinned, self.loaded, self.engine = pinned, "", engine

    def ask(self, **request: Any) -> dict[str, Any]:
        if request["do"] == "load":
            self.loaded = Path(request["path"]).name
        if request["do"] == "time":
            slow = FakeChild.speed()
            decode, ttft = self.table[self.loaded]
            return {"ttft_ms": ttft * slow, "step_ms": [decode * slow] * request["tokens"], "cpu_s": 0.0}
        return {"peak_bytes": 1000 + 500 * bool(self.loaded), "load_ms": 5.0}

    def __enter__(self) -> FakeChild:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


class Kept:
    """The reference's figures, as a study keeps them."""

    def __init__(self, value: Nominal | None = None) -> None:
        self.value = value

    def __call__(self, new: Nominal | None) -> Nominal | None:
        self.value = new or self.value
        return self.value


@pytest.fixture
def fake_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LatencyBenchmark]:
    monkeypatch.setattr(lane_module, "EngineChild", FakeChild)
    monkeypatch.setattr(turns_module, "busy_seconds", lambda _cpus: 0.0)
    monkeypatch.setattr(turns_module, "waited_seconds", lambda _pid: 0.0)
    monkeypatch.setattr(time, "sleep", lambda _s: None)
    monkeypatch.setattr(FakeChild, "speed", staticmethod(itertools.repeat(1.0).__next__))
    return lambda kept: LatencyBenchmark(tmp_path / "reference.onnx", 1, "print", MachineLock(tmp_path), kept)


def test_the_lane_multiplies_the_ratio_with_the_references_nominal(fake_lane: Callable[..., LatencyBenchmark]) -> None:
    result = fake_lane(Kept(Nominal(1.9, 31.0))).measure(Path("x.onnx"))
    assert result.stable
    assert result.measurements["decode_ms_per_token"].value == pytest.approx(0.95)
    assert result.measurements["ttft_ms"].value == pytest.approx(15.5)
    assert result.measurements["decode_ms_per_token"].provenance == "measured"
    assert result.measurements["peak_memory_bytes"].value == 500


def test_a_machine_that_slows_down_for_both_changes_nothing(
    fake_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slower by 0.05 % every turn. The candidate comes in the middle of every R C C R, so that a linear drift cancels."""
    benchmark = fake_lane(Kept(Nominal(2.0, 30.0)))
    monkeypatch.setattr(FakeChild, "speed", staticmethod(itertools.count(1.0, 0.0005).__next__))
    found = benchmark.measure(Path("x.onnx")).measurements["decode_ms_per_token"]
    assert found.value == pytest.approx(1.0, rel=1e-3)
    assert found.provenance == "measured"


@pytest.mark.parametrize("factor", [1.5, 0.6])
def test_a_reference_far_from_its_nominal_is_disturbed(
    fake_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    benchmark = fake_lane(Kept(Nominal(2.0, 30.0)))
    monkeypatch.setattr(FakeChild, "speed", staticmethod(itertools.repeat(factor).__next__))
    result = benchmark.measure(Path("x.onnx"))
    assert not result.stable
    assert {result.measurements[n].provenance for n in ("decode_ms_per_token", "ttft_ms", "decode_p90_ms")} == {
        "disturbed"
    }


def test_the_nominal_is_learnt_only_when_the_machine_is_quiet(
    fake_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    benchmark = fake_lane(kept)
    busy = itertools.count(0, 1000)
    monkeypatch.setattr(turns_module, "busy_seconds", lambda _cpus: float(next(busy)))
    assert not benchmark.measure(Path("x.onnx")).stable
    assert kept.value is None
    monkeypatch.setattr(turns_module, "busy_seconds", lambda _cpus: 0.0)
    assert benchmark.measure(Path("x.onnx")).stable
    assert kept.value == Nominal(2.0, 30.0, lane_module.LEAST_SPREAD, lane_module.LEAST_SPREAD)


def test_processes_that_differ_widen_the_interval(
    fake_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = fake_lane(Kept(Nominal(2.0, 30.0)))
    quiet = benchmark.measure(Path("x.onnx")).measurements["decode_ms_per_token"]
    noise = np.random.default_rng(0)
    monkeypatch.setattr(FakeChild, "speed", staticmethod(lambda: float(noise.lognormal(0, 0.15))))
    noisy = benchmark.measure(Path("x.onnx")).measurements["decode_ms_per_token"]
    assert quiet.samples == lane_module.VISITS * turns_module.ROUNDS
    assert quiet.low < quiet.value < quiet.high, "the machine's own spread is always in the interval"
    assert noisy.high - noisy.low > 3 * (quiet.high - quiet.low)


def test_odd_values_are_rare_and_far() -> None:
    assert odd_ones([1.0, 1.15, 1.01], 0.01) == {1}
    assert odd_ones([1.0, 1.05, 1.01], 0.01) == set(), "within six spreads"
    assert odd_ones([1.0, 1.15], 0.01) == set(), "of two, neither is odd"
    assert odd_ones([1.0, 1.15, 1.0, 1.16, 1.01], 0.01) == set(), "two of five are no exception"
    assert odd_ones([2.0, 2.3, 2.0, 2.32, 2.02, 1.99], 0.01) == {1, 3}


def test_the_moderated_interval_is_students_when_the_prior_has_no_weight() -> None:
    """Against scipy's own t interval; and with a prior of the same spread it is narrower."""
    from scipy import stats

    values = [1.0, 1.04, 0.97, 1.01]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert moderated_interval(values, 0.5, prior_df=0) == pytest.approx((np.mean(values), low, high))
    spread = float(np.std(values, ddof=1) / np.mean(values))
    _, narrow_low, narrow_high = moderated_interval(values, spread, prior_df=20)
    assert low < narrow_low < narrow_high < high


def test_one_visit_reuses_a_pair(fake_lane: Callable[..., LatencyBenchmark]) -> None:
    benchmark = fake_lane(Kept(Nominal(2.0, 30.0)))
    with benchmark.pair() as pair:
        found = benchmark.quick(Path("x.onnx"), pair).measurements
        again = benchmark.quick(Path("reference.onnx"), pair).measurements
    assert found["decode_ms_per_token"].value == pytest.approx(1.0)
    assert again["decode_ms_per_token"].value == pytest.approx(2.0)
    assert pair.reference.pinned and pair.candidate.pinned  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Teacher) -> Path:
    path = tmp_path_factory.mktemp("lane") / "model.onnx"
    shape = tiny_teacher.shape
    candidate = Space.of(shape, KERNELS).baselines()[-1]
    save_model(build_model(tiny_teacher.weights(), candidate, tiny_teacher.config, shape), path)
    return path


@pytest.fixture
def benchmark(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatencyBenchmark:
    for name, value in (("RETRIES", 0), ("VISITS", 2), ("NOMINAL_VISITS", 2)):
        monkeypatch.setattr(lane_module, name, value)
    return LatencyBenchmark(model, 1, "print", MachineLock(tmp_path / "lock"), Kept())


def test_the_lane_measures_a_real_engine(benchmark: LatencyBenchmark, model: Path) -> None:
    """Whether it is called measured depends on what else this machine does just now; that both words agree does not."""
    result = benchmark.measure(model)
    found = result.measurements
    assert found.keys() == {*LATENCIES, "throughput_tokens_per_s", "decode_p90_ms", "peak_memory_bytes", "load_ms"}
    for name in ("decode_ms_per_token", "ttft_ms", "decode_p90_ms"):
        assert found[name].provenance == ("measured" if result.stable else "disturbed")
        assert 0 < found[name].low <= found[name].value <= found[name].high
        assert found[name].fingerprint == "print"
    assert found["peak_memory_bytes"].value > 0
    assert found["load_ms"].value > 0
    assert found["decode_p90_ms"].samples >= 2 * 4 * 2 * turns_module.NEW_TOKENS


def test_a_busy_machine_is_called_disturbed(benchmark: LatencyBenchmark, model: Path) -> None:
    """Four busy processes that end by themselves, on however many cores there are."""
    busy = [
        subprocess.Popen(
            [sys.executable, "-c", "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"]
        )
        for _ in range(max(4, 2 * (os.cpu_count() or 1)))
    ]
    try:
        result = benchmark.measure(model)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert not result.stable
    assert result.measurements["decode_ms_per_token"].provenance == "disturbed"
    assert benchmark.nominal(None) is None, "a disturbed reference must not become the nominal"


def test_a_broken_model_is_infeasible_before_the_machine_is_taken(
    benchmark: LatencyBenchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(MachineLock, "exclusive", lambda *_: taken.append(1))
    (tmp_path / "broken.onnx").write_text("no model")
    with pytest.raises(Infeasible, match="broken"):
        benchmark.measure(tmp_path / "broken.onnx")
    assert not taken


def test_timing_happens_under_the_exclusive_lock(
    fake_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark, held, seen = fake_lane(Kept(Nominal(2.0, 30.0))), [], []
    real = MachineLock.exclusive

    @contextlib.contextmanager
    def watched(lock: MachineLock) -> Iterator[None]:
        with real(lock):
            held.append(1)
            yield
            held.pop()

    monkeypatch.setattr(MachineLock, "exclusive", watched)

    def speed() -> float:
        seen.append(bool(held))
        return 1.0

    monkeypatch.setattr(FakeChild, "speed", staticmethod(speed))
    with benchmark.pair() as pair:
        benchmark.quick(Path("x.onnx"), pair)
    assert seen == [False, False] + [True] * 32, "a warm-up each, then eight rounds of four turns under the lock"


class FakeStat:
    """/proc/stat of four CPUs, of which `busy` use 100 seconds between two looks."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, dict.fromkeys(range(4), 0)
        self.write()

    def work(self, *busy: int, column: int = 0) -> None:
        for cpu in busy:
            self.seconds[cpu] += 100
        self.write(column)

    def write(self, column: int = 0) -> None:
        tick, lines = os.sysconf("SC_CLK_TCK"), ["cpu  1 2 3 4 5 6 7 8 0 0"]
        for cpu, seconds in self.seconds.items():
            fields = [0, 0, 0, 10**6, 10**6, 0, 0, 0, 0, 0]
            fields[column] = seconds * tick
            lines.append(f"cpu{cpu} {' '.join(map(str, fields))}")
        self.path.write_text("\n".join([*lines, "intr 1 2 3", "ctxt 9"]) + "\n")


@pytest.mark.parametrize(
    ("busy", "quiet"), [((), True), ((0, 1, 2), True), ((3,), False), ((0, 1, 2, 3), False)], ids=str
)
@pytest.mark.parametrize("column", [0, 7], ids=["user", "steal"])
def test_only_what_runs_on_the_lanes_own_cpus_disturbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: tuple[int, ...], quiet: bool, column: int
) -> None:
    stat = FakeStat(tmp_path / "stat")
    monkeypatch.setattr(turns_module, "STAT", stat.path)
    monkeypatch.setattr(turns_module, "waited_seconds", lambda _pid: 0.0)
    monkeypatch.setattr(turns_module, "with_siblings", lambda cpus: cpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    watch = turns_module.Watch([FakeChild(1), FakeChild(1)])  # type: ignore[list-item]
    stat.work(*busy, column=column)
    assert turns_module.BenchmarkSession(foreign_cores=watch.foreign_cores()).quiet == quiet


def test_a_child_that_had_to_wait_is_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = itertools.count(0.0, 100.0)
    monkeypatch.setattr(turns_module, "busy_seconds", lambda _cpus: 0.0)
    monkeypatch.setattr(turns_module, "waited_seconds", lambda _pid: next(waited))
    watch = turns_module.Watch([FakeChild(1)])  # type: ignore[list-item]
    assert not turns_module.BenchmarkSession(foreign_cores=watch.foreign_cores()).quiet


@pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists(), reason="the kernel does not say how long a process waited"
)
def test_waiting_is_read_from_the_kernel() -> None:
    """Two busy processes on one CPU wait for each other; one that sleeps waits for nobody."""
    busy, idle = "import time\nend = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass", "input()"
    cpu = max(os.sched_getaffinity(0))
    programs = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, {cpu})
        )
        for code in (busy, busy, idle)
    ]
    try:
        before = [turns_module.waited_seconds(p.pid) for p in programs]
        time.sleep(1.0)
        waited = [turns_module.waited_seconds(p.pid) - b for p, b in zip(programs, before, strict=True)]
    finally:
        for program in programs:
            program.kill()
            program.communicate()
    assert waited[0] + waited[1] > 0.3
    assert waited[2] < 0.5 * (waited[0] + waited[1])


def test_siblings_of_a_core_belong_together() -> None:
    cpus = os.sched_getaffinity(0)
    found = turns_module.with_siblings({min(cpus)})
    assert min(cpus) in found and turns_module.with_siblings(found) == found


def test_a_lock_that_others_keep_costs_the_value_its_word_not_the_search(
    fake_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(Nominal(1.9, 31.0))
    benchmark, asked = fake_lane(kept), []

    @contextlib.contextmanager
    def busy(_lock: MachineLock) -> Iterator[None]:
        asked.append(1)
        raise EnvironmentProblem("the machine was busy with other paretune work", "")
        yield  # type: ignore[unreachable]  # what makes it a generator

    monkeypatch.setattr(MachineLock, "exclusive", busy)
    result = benchmark.measure(Path("x.onnx"))
    found = result.measurements["decode_ms_per_token"]
    assert not result.stable and found.provenance == "disturbed" and found.value == pytest.approx(0.95)
    assert "did not let go" in found.note
    assert len(asked) == 1, "nobody waits again for the other visits"
    with benchmark.pair() as pair:
        assert not benchmark.quick(Path("x.onnx"), pair).stable
    kept.value = None
    assert not fake_lane(kept).measure(Path("x.onnx")).stable and kept.value is None
