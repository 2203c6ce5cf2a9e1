"""What the latency benchmark does on request: an interval, another engine, a sweep, energy by a counter. No processes, no clock."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from paretune.common.errors import EnvironmentProblem, Infeasible, UsageError
from paretune.hardware_profiles import MachineLock
from paretune.objectives.artifacts import remeasure as remeasuring
from paretune.objectives.artifacts import sweeping
from paretune.objectives.artifacts.remeasure import Agreement, Remeasured, require_at_hand
from paretune.objectives.artifacts.sweeping import Swept
from paretune.objectives.latency import benchmark, energy_pass, power, sweep
from paretune.objectives.latency import workload as turns
from paretune.objectives.latency.benchmark import LatencyBenchmark, LatencyResult, Nominal
from paretune.objectives.latency.sweep import SweepPoint, is_quiet, sweep_points
from paretune.objectives.latency.workload import STANDARD, Workload
from paretune.objectives.measurement import Measurement

NOMINAL = Nominal(2.0, 30.0)
X = Path("x.onnx")


class FakeChild:
    """An engine that obeys a law: TTFT is 0.1 ms per prompt token, a step 1 ms + 0.001 per token of context + 0.25 per further
    sequence; the reference takes 2 and 30 ms. It refuses batches beyond `most_batch`, and dies of it."""

    pid = os.getpid()
    made: ClassVar[list[FakeChild]] = []
    most_batch = 99
    speed: ClassVar[Callable[[], float]] = staticmethod(itertools.repeat(1.0).__next__)

    def __init__(self, threads: int, pinned: bool = False, engine: str = "onnxruntime") -> None:
        self.pinned, self.engine, self.dead = pinned, engine, False
        self.asked: list[dict[str, Any]] = []
        FakeChild.made.append(self)

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked.append(request)
        if self.dead:
            raise Infeasible("the engine died", "")
        if request["do"] == "load":
            self.name = Path(request["path"]).name
        if request["do"] == "time":
            return self._time(request["prompt"], request["tokens"], request["batch"])
        return {"peak_bytes": 1000, "load_ms": 5.0}

    def _time(self, prompt: int, tokens: int, batch: int) -> dict[str, Any]:
        slow = FakeChild.speed()
        if self.name == "reference.onnx":
            return {"ttft_ms": 30.0, "step_ms": [2.0] * tokens}
        if batch > self.most_batch:
            self.dead = True
            raise Infeasible(f"the engine refused to time: no batch of {batch}", "")
        step = (1 + 0.001 * prompt + 0.25 * (batch - 1)) * slow
        return {"ttft_ms": 0.1 * prompt * slow, "step_ms": [step] * tokens}

    def __enter__(self) -> FakeChild:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""


@pytest.fixture
def quiet_lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LatencyBenchmark]:
    monkeypatch.setattr(benchmark, "EngineChild", FakeChild)
    monkeypatch.setattr(time, "sleep", lambda _s: None)
    monkeypatch.setattr(turns, "busy_seconds", lambda _cpus: 0.0)
    monkeypatch.setattr(turns, "waited_seconds", lambda _pid: 0.0)
    monkeypatch.setattr(FakeChild, "speed", staticmethod(itertools.repeat(1.0).__next__))
    monkeypatch.setattr(FakeChild, "made", [])
    return lambda **more: LatencyBenchmark(
        tmp_path / "reference.onnx", 1, "print", MachineLock(tmp_path), lambda _: NOMINAL, **more
    )


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(0, 1000)
    monkeypatch.setattr(turns, "busy_seconds", lambda _cpus: float(next(seconds)))


def speeds(spread: float, seed: int = 0) -> Callable[[], float]:
    """A machine on which every visit is slower or faster by about `spread`. Constant inside a visit of 17 turns of the candidate."""
    noise, count = np.random.default_rng(seed), itertools.count()
    current = [1.0]

    def speed() -> float:
        if next(count) % 34 == 0:  # the reference's turns are counted too: 2 warm-ups and 32
            current[0] = float(noise.normal(1, spread))
        return current[0]

    return speed


def test_visits_go_on_until_the_interval_is_reached(
    quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeChild, "speed", staticmethod(speeds(0.02, seed=4)))
    plain = quiet_lane().latencies(X)
    monkeypatch.setattr(FakeChild, "speed", staticmethod(speeds(0.02, seed=4)))
    asked = quiet_lane().latencies(X, within=0.02)
    assert plain.visits == benchmark.VISITS and plain.stable and plain.half_width > 0.02, (
        "without asking it is only said"
    )
    assert benchmark.VISITS < asked.visits <= benchmark.MOST_VISITS and asked.stable and asked.half_width <= 0.02
    assert asked.measurements["decode_ms_per_token"].value == pytest.approx(1.128, rel=0.02)


def test_an_interval_out_of_reach_is_said_and_nothing_is_called_measured(
    quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeChild, "speed", staticmethod(speeds(0.2)))
    found = quiet_lane().latencies(X, within=0.02)
    assert found.visits == benchmark.MOST_VISITS and found.flagged == 0 and not found.stable
    assert {m.provenance for m in found.measurements.values()} == {"disturbed"}
    assert "±2.0% was not reached in 12 visits" in found.measurements["ttft_ms"].note


def odd_process(places: set[int], factor: float) -> Callable[[], float]:
    """A machine on which the visits at `places` have a candidate that is `factor` times as slow in every turn."""
    count = itertools.count()

    def speed() -> float:
        visit, turn = divmod(next(count), 34)  # as in `speeds`: the reference's warm-up, the candidate's, then R C C R
        candidate = turn == 1 or (turn >= 2 and (turn - 2) % 4 in (1, 2))
        return factor if candidate and visit in places else 1.0

    return speed


def test_an_odd_process_is_left_out_said_and_replaced(
    quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeChild, "speed", staticmethod(odd_process({1}, 1.15)))
    found = quiet_lane().latencies(X)
    decode = found.measurements["decode_ms_per_token"]
    assert found.visits == benchmark.VISITS + 1 and decode.value == pytest.approx(1.128, rel=1e-3)
    assert "3 fresh pairs of processes, 1 odd ones left out" in decode.note


def test_processes_that_are_often_odd_are_no_exceptions(
    quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two modes of a kind belong to the answer: all visits count, and the interval holds both."""
    monkeypatch.setattr(FakeChild, "speed", staticmethod(odd_process({0, 2, 4}, 1.15)))
    found = quiet_lane().latencies(X)
    decode = found.measurements["decode_ms_per_token"]
    assert "left out" not in decode.note
    assert decode.low < 1.128 * 1.03 and decode.high > 1.128 * 1.12


def test_a_busy_machine_is_given_up_soon(quiet_lane: Callable[..., LatencyBenchmark], busy: None) -> None:
    found = quiet_lane().latencies(X, within=0.02)
    assert found.visits == found.flagged == benchmark.MOST_DISTURBED and not found.stable
    assert {m.provenance for m in found.measurements.values()} == {"disturbed"}


def test_throughput_is_the_same_visits_turned_round(quiet_lane: Callable[..., LatencyBenchmark]) -> None:
    found = quiet_lane().measure(X).measurements
    decode, rate = found["decode_ms_per_token"], found["throughput_tokens_per_s"]
    assert (rate.value, rate.low, rate.high) == pytest.approx((1e3 / decode.value, 1e3 / decode.high, 1e3 / decode.low))
    assert rate.provenance == "measured" and rate.samples == decode.samples and rate.unit == "tokens/s"


def test_the_candidate_runs_in_its_engine_and_the_reference_in_onnx_runtime(
    quiet_lane: Callable[..., LatencyBenchmark],
) -> None:
    quiet_lane(engine="openvino", provider="CPU").measure(X)
    loads = [(c.engine, r) for c in FakeChild.made for r in c.asked if r["do"] == "load"]
    engines = {
        Path(r["path"]).name: {(e, x["engine"], x["provider"]) for e, x in loads if x["path"] == r["path"]}
        for _, r in loads
    }
    assert engines == {
        "x.onnx": {("openvino", "openvino", "CPU")},
        "reference.onnx": {("onnxruntime", "onnxruntime", "CPUExecutionProvider")},
    }


# a sweep


def test_points_are_those_that_fit_into_the_context() -> None:
    found = sweep_points(512, (16, 510, 511), (128, 488, 489), (1, 4))
    assert [p for p in found if p.phase == "ttft"] == [SweepPoint("ttft", 16), SweepPoint("ttft", 510)]
    assert {(p.length, p.batch) for p in found if p.phase == "decode"} == {(128, 1), (488, 1), (128, 4), (488, 4)}
    assert all(p.turn.prompt + p.turn.tokens <= 512 for p in found)
    assert SweepPoint("decode", 488, 4).turn == Workload(488, turns.NEW_TOKENS, 4)
    with pytest.raises(ValueError, match="1 or more"):
        Workload(0)


def test_a_sweep_finds_the_law(quiet_lane: Callable[..., LatencyBenchmark]) -> None:
    """The fake's law, drift-corrected; tokens per second count all sequences. Negative control: another length, another time."""
    points = sweep_points(600, (32, 256), (128, 512), (1, 4))
    rows = {row.point: row for row in sweep.sweep(quiet_lane(), X, points)}
    assert list(rows) == points and is_quiet(rows.values())
    for point, row in rows.items():
        law = 0.1 * point.length if point.phase == "ttft" else 1 + 0.001 * point.length + 0.25 * (point.batch - 1)
        tokens = point.length if point.phase == "ttft" else point.batch
        assert row.time is not None and row.rate is not None
        assert row.time.value == pytest.approx(law) and row.rate.value == pytest.approx(1e3 * tokens / law)
        assert row.time.low < law < row.time.high and row.time.provenance == "measured"
        assert row.time.samples == benchmark.VISITS * turns.ROUNDS
    assert rows[points[0]].time != rows[points[1]].time


def test_what_the_engine_refuses_is_a_row_with_its_reason_and_costs_no_other(
    quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeChild, "most_batch", 2)
    rows = sweep.sweep(quiet_lane(), X, sweep_points(600, (32,), (128,), (1, 4, 2)))
    refused = [row for row in rows if row.time is None]
    assert [row.point.batch for row in refused] == [4] and "no batch of 4" in refused[0].reason
    assert all(row.time is not None and row.time.provenance == "measured" for row in rows if row not in refused)
    assert is_quiet(rows)
    asked = [r for c in FakeChild.made for r in c.asked if r["do"] == "time" and r["batch"] == 4]
    assert len(asked) == 1, "it is not asked again"


def test_a_busy_machine_disturbs_every_row(quiet_lane: Callable[..., LatencyBenchmark], busy: None) -> None:
    rows = sweep.sweep(quiet_lane(), X, [SweepPoint("ttft", 32), SweepPoint("decode", 128)])
    assert [row.time.provenance for row in rows if row.time is not None] == ["disturbed"] * 2 and not is_quiet(rows)
    assert len(FakeChild.made) == 2 * benchmark.RETRIES, "two passes without one quiet visit are enough"


def test_a_lock_that_others_keep_ends_the_sweep_at_once(
    quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(_lock: MachineLock) -> None:
        asked.append(1)
        raise EnvironmentProblem("busy", "")

    monkeypatch.setattr(MachineLock, "exclusive", refuse)
    rows = sweep.sweep(quiet_lane(), X, [SweepPoint("ttft", 32), SweepPoint("decode", 128)])
    assert len(asked) == 1 and not is_quiet(rows)
    assert rows[0].time is not None and rows[0].time.provenance == "disturbed" and "did not let go" in rows[1].reason


def test_the_table_of_a_sweep(quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeChild, "most_batch", 1)
    rows = tuple(sweep.sweep(quiet_lane(), X, sweep_points(600, (256,), (128,), (1, 2))))
    found = Swept(Path("a"), "local-cpu", rows)
    head, first, second, third = found.lines()
    assert head.split()[:3] == ["tokens", "batch", "ms"]
    assert first.split()[:4] == ["ttft", "256", "1", "25.600"] and first.split()[-1] == "10000"
    assert second.split()[:4] == ["decode", "128", "1", "1.128"] and third.endswith("no batch of 2")
    assert found.problem() is None and found.to_dict()["measured"]
    assert [row["point"]["length"] for row in found.to_dict()["sweep"]] == [256, 128, 128]


def test_a_sweep_that_was_disturbed_ends_with_5(quiet_lane: Callable[..., LatencyBenchmark], busy: None) -> None:
    rows = tuple(sweep.sweep(quiet_lane(), X, [SweepPoint("ttft", 32)]))
    found = Swept(Path("a"), "local-cpu", rows)
    problem = found.problem()
    assert problem is not None and problem.exit_code == 5 and "1 of 1 points were disturbed" in problem.problem
    assert "(disturbed)" in found.lines()[1] and not found.to_dict()["measured"]


# measuring again


def result(half: float, visits: int = 3, flagged: int = 0, stable: bool = True) -> LatencyResult:
    m = Measurement(1.0, "ms/token", 1 - half, 1 + half, "measured" if stable else "disturbed", 24, "m")
    return LatencyResult({"decode_ms_per_token": m, "ttft_ms": m}, stable, visits, flagged)


@pytest.mark.parametrize(
    ("lane_said", "words"),
    [
        (result(0.01), None),
        (result(0.01, 4, 1), None),
        (result(0.30, 4, 4, False), "4 of 4 benchmark sessions were disturbed"),
        (result(0.08, 12, 0, False), "should be ±3.0%, but the widest is ±8.0% after 12 visits"),
    ],
)
def test_an_artifact_measured_again_says_why_it_is_not(lane_said: LatencyResult, words: str | None) -> None:
    m = lane_said.measurements
    others = {"peak_memory_bytes": Measurement.exact(1e6, "bytes", "x"), "load_ms": m["ttft_ms"]}
    agreements = tuple(Agreement(name, m[name], m[name]) for name in m)
    found = Remeasured(Path("a"), "local-cpu", 0.03, lane_said, agreements, others)
    problem = found.problem()
    assert (problem is None) == (words is None) == found.to_dict()["measured"]
    if problem is not None:
        assert (
            words is not None and words in problem.problem and problem.exit_code == 5 and "--within" in problem.remedy
        )
        assert all(a.agrees is None for a in found.agreements), "a disturbed value agrees with nothing"
    else:
        assert all(a.agrees for a in found.agreements)
    assert found.to_dict()["disturbed_visits"] == lane_said.flagged


def test_a_target_that_is_not_at_hand_is_not_measured() -> None:
    require_at_hand(SimpleNamespace(name="local-cpu", at_hand=True, agent=None))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nvidia-h100 is another machine"):
        require_at_hand(SimpleNamespace(name="nvidia-h100", at_hand=False, agent=None))  # type: ignore[arg-type]
    board = SimpleNamespace(name="board", at_hand=True, agent="http://board:7411")
    with pytest.raises(UsageError, match="board is another machine"):
        require_at_hand(board)  # type: ignore[arg-type]


def test_measuring_again_adds_energy_and_cost_of_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latency benchmark and the artifact are stood in for; the arithmetic and the comparison are real."""
    profile = SimpleNamespace(name="p", at_hand=True, agent=None, power_watts=20.0, price_usd_per_hour=0.36, devices=2)
    then = Measurement(1.02, "ms/token", 1.01, 1.03, "measured", 24, "m").to_dict()
    facts = {"profile": "p", "measurements": {"decode_ms_per_token": then}}
    said = result(0.01)
    memory = {"peak_memory_bytes": Measurement.exact(1e6, "bytes", "x"), "load_ms": Measurement.exact(1.0, "ms")}
    said.measurements.update(memory)
    lanes = SimpleNamespace(measure=lambda _model, _within: said)
    monkeypatch.setattr(remeasuring, "check_artifact", lambda _folder: facts)
    monkeypatch.setattr(remeasuring, "load_profile", lambda _name, _home: profile)
    monkeypatch.setattr("paretune.objectives.agent.remote.open_benchmark", lambda *_: lanes)
    monkeypatch.setattr(remeasuring, "context_of", lambda _artifact: 2048)
    found = remeasuring.remeasure(Path("a"), "p", Path("home"))
    assert found.others["energy_j_per_token"].value == pytest.approx(0.020), (
        "the latency benchmark runs on one of the two devices"
    )
    assert found.others["energy_j_per_token"].provenance == "predicted"
    assert found.others["usd_per_million_tokens"].value == pytest.approx(0.1)
    decode, ttft = found.agreements
    assert decode.agrees and ttft.agrees is None, "the study said nothing of TTFT"
    text = "\n".join(found.lines())
    assert "agrees" in text and "J/token (predicted)" in text and "tokens/s (measured)" in text
    profile.power_watts = profile.price_usd_per_hour = None
    assert (
        not {"energy_j_per_token", "usd_per_million_tokens"}
        & remeasuring.remeasure(Path("a"), "p", Path("h")).others.keys()
    )


def test_a_sweep_is_of_a_decoder_with_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "check_artifact", lambda _folder: {"kind": "module"})
    with pytest.raises(UsageError, match="module of a plug-in"):
        sweeping.sweep_artifact(tmp_path, "local-cpu", tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "genai_config.json").write_text('{"model": {"context_length": 64}}')
    monkeypatch.setattr(sweeping, "check_artifact", lambda _folder: {})
    with pytest.raises(UsageError, match="64 tokens"):
        sweeping.sweep_artifact(tmp_path, "local-cpu", tmp_path, (64,), (64,), (1,))


# energy by a counter


class Zones:
    """A fake /sys/class/powercap with two packages, a subzone, the platform and the memory-mapped double."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder, name in (
            ("intel-rapl:0", "package-0"),
            ("intel-rapl:0:0", "core"),
            ("intel-rapl:1", "package-1"),
            ("intel-rapl:2", "psys"),
            ("intel-rapl-mmio:0", "package-0"),
        ):
            (root / folder).mkdir(parents=True)
            (root / folder / "name").write_text(name + "\n")
            (root / folder / "max_energy_range_uj").write_text("1000000\n")
            self.set(folder, 500_000)

    def set(self, zone: str, microjoules: int) -> None:
        (self.root / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_rapl_adds_packages_only_and_survives_a_wrap(tmp_path: Path) -> None:
    zones = Zones(tmp_path)
    counter = power.rapl(tmp_path)
    assert counter is not None and counter.joules() == 0.0 and "2 package" in counter.source
    zones.set("intel-rapl:0", 700_000)
    zones.set("intel-rapl:1", 600_000)
    for other in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        zones.set(other, 999_999)
    assert counter.joules() == pytest.approx(0.3)
    zones.set("intel-rapl:0", 100_000)  # wrapped: 300,000 to the end of the range, 100,000 after it
    assert counter.joules() == pytest.approx(0.7)
    assert counter.joules() == pytest.approx(0.7)
    zones.set("intel-rapl:1", 599_999)  # one less than before: a whole range, nearly
    assert counter.joules() == pytest.approx(0.7 + 0.999999)


def test_without_a_readable_package_there_is_no_counter(tmp_path: Path) -> None:
    assert power.rapl(tmp_path / "none") is None
    zones = Zones(tmp_path)
    for zone in ("intel-rapl:0", "intel-rapl:1"):
        (zones.root / zone / "energy_uj").unlink()
        (zones.root / zone / "energy_uj").mkdir()  # reading it fails, for root too
    assert power.rapl(tmp_path) is None and power.energy_counter("cpu", tmp_path) is None


def test_nvml_counts_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    count, shut = iter([1000, 2500]), []
    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: f"gpu{index}",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(count) if handle == "gpu0" else 0,
        nvmlShutdown=lambda: shut.append(1),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    counter = power.energy_counter("gpu")
    assert isinstance(counter, power.Nvml) and counter.joules() == 2.5
    counter.close()
    assert shut


@pytest.mark.parametrize(("printed", "there"), [("50.00", True), ("[N/A]", False)])
def test_nvidia_smi_is_integrated_where_there_is_no_pynvml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, there: bool
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nwhile :; do echo '{printed}'; sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    counter = power.energy_counter("gpu")
    assert (counter is not None) == there
    if counter is None:
        return
    begun, start = time.monotonic(), counter.joules()
    time.sleep(0.3)
    joules, seconds = counter.joules() - start, time.monotonic() - begun
    counter.close()
    assert joules == pytest.approx(50 * seconds, rel=0.1)
    assert isinstance(counter, power.NvidiaSmi)
    assert counter._process.returncode is not None, "the program does not outlive its counter"


class Meter:
    """Counts what the fake engine uses: 3 J per prefill, 0.5 J per step, 2 % noise."""

    source, settle_s = "a meter", 0.0

    def __init__(self) -> None:
        self.used, self.closed, self.noise = 0.0, False, np.random.default_rng(0)

    def joules(self) -> float:
        return self.used

    def close(self) -> None:
        self.closed = True

    def run(self, **request: Any) -> dict[str, Any]:
        assert request["do"] == "time" and request["prompt"] == 128 and request["batch"] == 1
        self.used += float(self.noise.normal(1, 0.02)) * (3 + 0.5 * request["tokens"])
        return {}


def test_energy_per_token_is_the_slope_without_the_prefill() -> None:
    meter = Meter()
    value, low, high = energy_pass.joules_per_token(SimpleNamespace(ask=meter.run), meter)  # type: ignore[arg-type]
    assert low < 0.5 < high and value == pytest.approx(0.5, rel=0.1)
    naive = (3 + 0.5 * STANDARD.tokens) / STANDARD.tokens
    assert not low < naive < high, "the prefill is not in it"


@pytest.mark.parametrize("disturbed", [False, True])
def test_the_lane_measures_energy_where_it_can(
    quiet_lane: Callable[..., LatencyBenchmark], monkeypatch: pytest.MonkeyPatch, disturbed: bool
) -> None:
    meter = Meter()
    timed = FakeChild._time

    def counted(child: FakeChild, prompt: int, tokens: int, batch: int) -> dict[str, Any]:
        if child.name == "x.onnx":
            meter.run(do="time", prompt=prompt, tokens=tokens, batch=batch)
        return timed(child, prompt, tokens, batch)

    monkeypatch.setattr(FakeChild, "_time", counted)
    measured = quiet_lane(counter=lambda: meter)
    if disturbed:
        seconds = itertools.count(0, 1000)
        monkeypatch.setattr(turns, "busy_seconds", lambda _cpus: float(next(seconds)))
    seen = measured.measure(X)
    if disturbed:
        assert not seen.stable and "energy_j_per_token" not in seen.measurements, "no time is spent on it"
        return
    found = seen.measurements["energy_j_per_token"]
    assert found.low < 0.5 < found.high and found.unit == "J/token" and found.note == "a meter" and meter.closed
    assert found.provenance == "measured"
    monkeypatch.setattr(benchmark, "joules_per_token", lambda *_: (-0.1, 0.0, 0.2))
    assert "energy_j_per_token" not in measured.measure(X).measurements, "less than nothing would dominate everything"
    assert "energy_j_per_token" not in quiet_lane().measure(X).measurements


def test_this_machine_is_asked_without_harm() -> None:
    """Whatever counters it has: one that answers only rises."""
    code = (
        "from paretune.objectives.latency.power import energy_counter\n"
        "for kind in ('cpu', 'gpu'):\n"
        "    counter = energy_counter(kind)\n"
        "    if counter is not None:\n"
        "        first = counter.joules()\n"
        "        assert counter.joules() >= first >= 0\n"
        "        counter.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
