"""Models whose context is shorter than what is usually timed: everything is measured within it, or refused before work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paretune.common.errors import Infeasible, UsageError
from paretune.compression.export.graph import build_model, save_model
from paretune.compression.network.student import plain_candidate
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import load_profile
from paretune.objectives.agent.client import RemoteBenchmark
from paretune.objectives.agent.order import Order
from paretune.objectives.latency import benchmark as lane_module
from paretune.objectives.latency.benchmark import LatencyBenchmark, Pair
from paretune.objectives.latency.measurement_key import target_key
from paretune.objectives.latency.sweep import sweep_points
from paretune.objectives.latency.workload import (
    NEW_TOKENS,
    PROMPT,
    STANDARD,
    BenchmarkSession,
    Workload,
    load_and_warm,
    run_workload,
    workload_within,
)
from paretune.search.evaluators.measuring import Measuring
from paretune.search.targets.profiles import roofline
from paretune.search.targets.targets import _turn
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher

CONTEXTS = (16, 32, 64, 100, 151)


@pytest.mark.parametrize("context", range(8, 400))
def test_a_turn_fits_into_every_context(context: int) -> None:
    turn = workload_within(context)
    assert turn.prompt + turn.tokens <= context
    assert 1 <= turn.prompt <= PROMPT and 2 <= turn.tokens <= NEW_TOKENS
    assert (turn == STANDARD) is (context >= PROMPT + NEW_TOKENS)


@pytest.mark.parametrize("context", [1, 2, 7])
def test_a_context_too_short_to_be_timed_is_refused(context: int) -> None:
    with pytest.raises(UsageError, match=f"8 tokens or more to be timed, but max_position_embeddings is {context}"):
        workload_within(context)


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_engine_runs_the_turn_and_no_more(tmp_path: Path, write_teacher: Callable[..., Path], context: int) -> None:
    teacher = load_teacher(str(write_teacher(tmp_path / "model", max_position_embeddings=context)))
    graph = build_model(teacher.weights(), plain_candidate(teacher.shape, 3), teacher.config, teacher.shape)
    save_model(graph, tmp_path / "model.onnx")
    turn = workload_within(context)
    with EngineChild(1) as child:
        assert load_and_warm(child, tmp_path / "model.onnx", 1, turn=turn) > 0
        assert len(run_workload(child, turn)["step_ms"]) == turn.tokens
        with pytest.raises(Infeasible):  # what the usual turn did
            run_workload(child, STANDARD)


def test_a_lane_times_its_own_turn_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Workload] = []

    def turns(_reference: Any, _candidate: Any, turn: Workload, **_more: Any) -> BenchmarkSession:
        seen.append(turn)
        return BenchmarkSession([1.0, 1.1], [1.0, 1.1], [0.5, 0.5], [5.0, 5.0], [0.5, 0.6])

    def warmed(*given: Any) -> float:
        seen.append(given[-1])
        return 1.0

    monkeypatch.setattr(lane_module, "run_abba_rounds", turns)
    monkeypatch.setattr(lane_module, "load_and_warm", warmed)
    monkeypatch.setattr(lane_module, "run_workload", lambda _child, turn: seen.append(turn))
    nominal = lane_module.Nominal(0.5, 5.0)
    benchmark = LatencyBenchmark(
        tmp_path / "r.onnx", 1, "machine", MachineLock(tmp_path), lambda _value: nominal, turn=Workload(48, 16)
    )
    pair: Any = Pair(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    found = benchmark.quick(tmp_path / "m.onnx", pair)
    assert seen == [Workload(48, 16), Workload(48, 16)]
    assert "16 tokens after a prompt of 48" in found.measurements["ttft_ms"].note
    seen.clear()
    benchmark.visit(pair, Workload(8, 2))  # as a sweep does
    assert seen == [Workload(8, 2), Workload(8, 2)]


def teacher_of(context: int) -> Teacher:
    return SimpleNamespace(context=context, shape=None)  # type: ignore[return-value]


def test_latencies_of_other_lengths_are_kept_apart(tmp_path: Path) -> None:
    profile = load_profile("jetson-orin-nano", tmp_path)
    host: Any = SimpleNamespace(teacher=teacher_of(64), profile=profile, fingerprint="m")
    assert Measuring(host).turn == Workload(48, 16)
    host.teacher = teacher_of(2048)
    assert Measuring(host).turn == STANDARD
    keys = {target_key(profile, "m", workload_within(context)) for context in (*CONTEXTS, 152, 2048)}
    assert len(keys) == len(CONTEXTS) + 1
    assert target_key(profile, "m", STANDARD) == target_key(profile, "m")


def test_an_agent_is_told_the_lengths_only_where_they_are_not_the_usual() -> None:
    benchmark = RemoteBenchmark(SimpleNamespace(), Path("r.onnx"), 1)  # type: ignore[arg-type]
    usual = benchmark._order("one")
    assert "prompt" not in usual.to_dict() and Order.from_dict(usual.to_dict()) == usual
    short = replace(benchmark, turn=Workload(48, 16))._order("one")
    assert (short.to_dict()["prompt"], short.to_dict()["new_tokens"]) == (48, 16)
    assert Order.from_dict(json.loads(json.dumps(short.to_dict()))) == short
    for wrong in ({"prompt": 0}, {"prompt": 10**9}, {"new_tokens": 25}, {"prompt": True}, {"new_tokens": "4"}):
        with pytest.raises(ValueError, match="must be between 1 and"):
            Order.from_dict({**short.to_dict(), **wrong})


def test_predictions_are_for_the_lengths_that_were_measured(tiny_teacher: Teacher, tmp_path: Path) -> None:
    profile = load_profile("nvidia-a100", tmp_path)
    candidate = plain_candidate(tiny_teacher.shape, 3)
    long, short = (roofline(t)(profile, candidate, tiny_teacher.shape) for t in (STANDARD, Workload(12, 4)))
    assert short["ttft_ms"].value < long["ttft_ms"].value
    assert _turn(SimpleNamespace(meta={"teacher": {"context": 16}})) == Workload(12, 4)  # type: ignore[arg-type]
    assert _turn(SimpleNamespace(meta={"teacher": {}})) == STANDARD  # type: ignore[arg-type]


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_sweep_stays_within_the_context(context: int) -> None:
    for point in sweep_points(context):
        assert point.turn.prompt + point.turn.tokens <= context
