"""The lane's benchmarks count what they say: with fakes of the lane, whose answers are known."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

sys.path.append(
    str(Path(__file__).resolve().parents[2])
)  # benchmarks is a folder of the repository, not of the package

from benchmarks import lane
from paretune.objectives.artifacts.remeasure import Agreement, Remeasured
from paretune.objectives.latency.benchmark import LatencyResult
from paretune.objectives.measurement import Measurement


def ms(value: float, half: float = 0.01, provenance: Any = "measured") -> Measurement:
    return Measurement(value, "ms", value * (1 - half), value * (1 + half), provenance, 24, "m")


def found(
    now: float, then: float | None = None, *, half: float = 0.01, stable: bool = True, flagged: int = 0
) -> Remeasured:
    seen = ms(now, half, "measured" if stable else "disturbed")
    result = LatencyResult({"decode_ms_per_token": seen}, stable, 3, flagged)
    agreement = Agreement("decode_ms_per_token", seen, None if then is None else ms(then, half))
    return Remeasured(Path("a"), "local-cpu", 0.02, result, (agreement,), {})


def test_seconds_are_the_median_over_all_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 29.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    asked = []

    def latencies(model: Path, within: float) -> LatencyResult:
        asked.append((model, within))
        reached = model.name != "2"
        return LatencyResult({"ttft_ms": ms(1.0, 0.01 if reached else 0.05)}, reached, 3 if reached else 12, 1)

    models = [Path("0"), Path("1"), Path("2")]
    figure = lane.seconds_figure(lane.timed(SimpleNamespace(latencies=latencies), models))  # type: ignore[arg-type]
    assert asked == [(m, 0.02) for m in models]
    assert figure["value"] == 3.0 and figure["spread"] == [2.0, 9.0]
    assert (figure["reached"], figure["structures"], figure["disturbed_visits"]) == (2, 3, 3)
    assert figure["median_half_width"] == pytest.approx(0.01)


def test_structures_differ_and_are_graphs(tmp_path: Path) -> None:
    models = lane.write_structures(tmp_path, 5, ("fp32/fp32", "int8/int8", "int4/int8"))
    assert len(models) == 5
    sizes = set()
    for model in models:
        assert onnx.load(str(model)).graph.node
        sizes.add(model.stat().st_size)
    assert len(sizes) == 5


def test_a_front_measured_again_is_counted_by_hand() -> None:
    """Errors 2.5, 1 and 10 %; the last was refused. The first two have changed places, the third with neither."""
    members = [
        lane.member("a", found(1.025, 1.00, half=0.001)),
        lane.member("b", found(1.01, 1.02, half=0.001)),
        lane.member("c", found(2.2, 2.0, half=0.001)),
        lane.member("d", found(9.0, 3.0, half=0.001, stable=False)),
    ]
    figure = lane.error_figure(members, "s")
    assert figure["value"] == pytest.approx(2 / 3) and figure["latencies"] == 3 and figure["refused"] == 1
    assert figure["worst_error"] == pytest.approx(0.10) and figure["median_error"] == pytest.approx(0.025)
    assert (figure["separate_pairs"], figure["inversions"]) == (3, 1)


def test_pairs_whose_intervals_touch_cannot_be_inverted() -> None:
    """Negative control: the same values with wide intervals count as no pair."""
    wide = [lane.member("a", found(1.03, 1.00, half=0.05)), lane.member("b", found(1.01, 1.02, half=0.05))]
    assert lane.inversions(wide) == (0, 0)
    narrow = [lane.member("a", found(1.03, 1.00, half=0.001)), lane.member("b", found(1.01, 1.02, half=0.001))]
    assert lane.inversions(narrow) == (1, 1)
    straight = [lane.member("a", found(1.00, 1.00, half=0.001)), lane.member("b", found(1.02, 1.02, half=0.001))]
    assert lane.inversions(straight) == (1, 0)


def test_what_the_study_did_not_measure_in_peace_is_not_compared() -> None:
    then = ms(1.0, provenance="disturbed")
    spoilt = found(1.0)
    spoilt = dataclasses.replace(spoilt, agreements=(Agreement("decode_ms_per_token", ms(1.0), then),))
    for member in (lane.member("a", spoilt), lane.member("b", found(1.0))):
        assert member.then == {} and member.now == {}
    assert lane.error_figure([lane.member("a", spoilt)], "s")["latencies"] == 0


def test_beside_a_neighbour_flagged_refused_and_wrong_are_counted() -> None:
    counts = lane.beside(
        [
            found(1.0, 1.0),
            found(1.0, 1.0, flagged=1),
            found(1.5, 1.0, half=0.01, flagged=2),  # called measured, and wrong
            found(2.0, 1.0, stable=False, flagged=3),
            found(2.0, 1.0, stable=False, flagged=3),
        ]
    )
    assert counts == lane.Beside(attempts=5, flagged=4, refused=2, kept=3, wrong=1)
    figure = lane.beside_figure(counts, "anywhere")
    assert (
        figure["value"] == 2
        and figure["unit"] == "of 5 refused"
        and figure["wrong"] == 1
        and figure["where"] == "anywhere"
    )


@pytest.mark.parametrize("pinned", [False, True])
def test_the_neighbour_is_busy_and_ends_with_the_block(monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    started = []
    real = subprocess.Popen

    def recorded(*arguments: Any, **options: Any) -> Any:
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recorded)
    cpu = max(os.sched_getaffinity(0))
    with lane.neighbour(cpu if pinned else None):
        assert started[0].poll() is None
        assert (os.sched_getaffinity(started[0].pid) == {cpu}) or not pinned
        fields = Path(f"/proc/{started[0].pid}/stat").read_text().rsplit(")", 1)[1].split()
        assert int(fields[11]) + int(fields[12]) > 0, "it uses a CPU"
    assert started[0].returncode is not None


def test_the_whole_benchmark_measures_every_member_and_both_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake study, lane and neighbour: nothing is measured beside a neighbour that is not there."""
    import contextlib

    here: list[int | str | None] = []

    @contextlib.contextmanager
    def neighbour(cpu: int | None) -> Iterator[None]:
        here.append(cpu)
        yield
        here.append("gone")

    def again(artifact: Path, profile: str, _home: Path, within: float) -> Remeasured:
        assert profile == "local-cpu" and within == 0.02
        busy = bool(here) and here[-1] != "gone"
        return found(1.0, 1.0, stable=not busy, flagged=int(busy))

    front = [SimpleNamespace(key=f"k{i}") for i in range(8)]
    view = SimpleNamespace(front=front, folder=Path("s"), study="s", meta={"profile": {"name": "local-cpu"}})
    monkeypatch.setattr(lane, "latest_study", lambda: view)
    monkeypatch.setattr(lane, "remeasure", again)
    monkeypatch.setattr(lane, "neighbour", neighbour)
    error, anywhere, on_core = lane.remeasure_error()
    assert error["value"] == 1.0 and error["members"] == 8 and error["refused"] == 0
    assert anywhere["value"] == on_core["value"] == 6 and anywhere["wrong"] == 0
    assert here == [None, "gone", max(os.sched_getaffinity(0)), "gone"]
