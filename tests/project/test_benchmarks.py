"""The benchmarks themselves: what is measured is what the name says, and joint against sequential from search to picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # benchmarks is a folder of the repository, not of the package

from benchmarks import joint, memory, run, speed  # noqa: E402
from paretune.search.execution.processes import descendants  # noqa: E402
from paretune.search.hypervolume import corner  # noqa: E402
from paretune.search.spec import Reference  # noqa: E402
from paretune.search.study.store import Store  # noqa: E402
from paretune.spaces import Shape  # noqa: E402

SMALL = {"budget": "5m", "fit_points": 30, "max_candidates": 44, "finalists": 1}


def test_every_promised_figure_has_its_benchmark() -> None:
    promised = {
        "quantize_seconds_per_100m_params",
        "prune_seconds_per_100m_params",
        "weights_fill_ms",
        "peak_rss_gb_135m",
        "joint_vs_sequential",
        "method_table",
        "measure_seconds",
        "remeasure_error",
    }
    assert promised <= run.BENCHMARKS.keys()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", "no_such"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2 and "joint_vs_sequential" in done.stderr


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SHAPE", Shape(2, 64, 128, 4, 2, 16, 96))
    monkeypatch.setattr(speed, "CONFIG", {**speed.CONFIG, "hidden_size": 64, "vocab_size": 96})


def test_method_times_are_per_parameter_of_the_matrices(small_model: None) -> None:
    found = [*speed.quantize_seconds_per_100m_params(), *speed.prune_seconds_per_100m_params()]
    assert {f["method"] for f in found} == {"rtn", "gptq", "wanda", "sparsegpt"}
    parameters = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    for f in found:
        assert f["measured_parameters"] == parameters and f["value"] > 0
        assert f["spread"][0] <= f["value"] <= f["spread"][1]


def test_a_filled_graph_holds_what_a_new_one_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = speed.weights_fill_ms()
    assert found["value"] > 0 and found["build_anew_ms"] > 0
    plain = speed.filling
    monkeypatch.setattr(speed, "filling", lambda kept: _forgetful(plain(kept)))
    with pytest.raises(RuntimeError, match="must hold what a new one holds"):
        next(speed.weights_fill_ms())


def _forgetful(filling: type[Any]) -> type[Any]:
    class Forgetful(filling):  # type: ignore[misc]
        def finish(self, *arguments: Any) -> Any:
            model = super().finish(*arguments)
            model.graph.initializer[-1].raw_data = b""
            return model

    return Forgetful


def test_memory_of_a_tree_counts_its_children() -> None:
    program = "import subprocess, sys, time; x = b'x' * (60 << 20); subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "import time; x = b'x' * (90 << 20); print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, child], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        found = memory.resident(process.pid)
        (grandchild,) = (pid for pid, _ in descendants(process.pid))
        own = memory.memory_of(process.pid)
        subprocess.run(["kill", str(grandchild)])
        process.kill()
    assert 60 <= own["Rss"] < 90
    assert own["Rss"] + 90 <= found["tree_rss_mb"] < own["Rss"] + 150
    assert found["tree_pss_mb"] <= found["tree_rss_mb"]
    assert memory.memory_of(2**22 + 1) == {"Rss": 0.0, "Pss": 0.0}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[joint.Arm]]:
    """One seed of the comparison through the command line, evaluations simulated."""
    folder = tmp_path_factory.mktemp("joint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARETUNE_EXECUTOR", "inline")
        patch.setenv("PARETUNE_EVALUATOR", "paretune.search.evaluators.simulated:SimulatedEvaluator")
        joint.run_seed(folder, 0, SMALL)
    return folder, joint.read_arms(folder)


@pytest.mark.timeout(280)
def test_both_arms_of_a_seed_run_to_their_end(compared: tuple[Path, list[joint.Arm]]) -> None:
    folder, arms = compared
    assert [(a.name, a.seed) for a in arms] == [("joint", 0), ("sequential", 0)]
    for arm in arms:
        assert arm.explored > 20 and arm.confirmed > 3 and len(arm.front) >= 3
        assert list(arm.seconds) == sorted(arm.seconds) and arm.seconds[0] > 0
        assert list(arm.volumes) == sorted(arm.volumes) and 0 < arm.volume < 1.2
    by_name = {}
    for name in joint.ARMS:
        store = Store.reader(folder / f"seed0-{name}" / "studies" / name)
        by_name[name] = (store.meta("sequential"), {row.source for row in store.candidates()}, store.meta("spec"))
        store.close()
    assert by_name["joint"][0] is None and by_name["sequential"][0]["masks"]
    assert "seed" in by_name["joint"][1] and by_name["sequential"][1] == {"baseline", "sampler"}
    differing = {k for k in by_name["joint"][2] if by_name["joint"][2][k] != by_name["sequential"][2][k]}
    assert differing == {"sampler"}


def test_the_volume_of_an_arm_is_what_random_points_say(compared: tuple[Path, list[joint.Arm]]) -> None:
    """The share of 20,000 uniform points below the corner that the front dominates; off by 0.02 once in 10^8 runs."""
    for arm in compared[1]:
        top, generator, hits = corner(arm.reference, arm.objectives), random.Random(0), 0
        for _ in range(20_000):
            point = [generator.uniform(0, side) for side in top]
            hits += any(all(f <= p for f, p in zip(v, point, strict=True)) for v in arm.front)
        assert arm.volume == pytest.approx(hits / 20_000, abs=0.02)


def test_complete_arms_are_not_run_again_and_half_ones_are(
    compared: tuple[Path, list[joint.Arm]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = compared
    asked: list[str] = []
    monkeypatch.setattr(joint, "prepare_cache", lambda home, _: (home / "cache").mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(joint, "tidy", lambda *_: None)
    joint.run_seed(folder, 0, SMALL, lambda _spec, _home, name: asked.append(name))
    assert asked == []
    joint.run_seed(folder, 1, SMALL, lambda _spec, _home, name: asked.append(name))
    assert asked == ["sequential", "joint"], "arms take turns in being first"
    settings = json.loads((folder / "seed1-joint" / "spec.yaml").read_text())
    assert settings == {**SMALL, "seed": 1, "sampler": "tpe"}
    assert [a.seed for a in joint.read_arms(folder)] == [0, 0], "what did not end is not read"


def test_the_figure_is_the_median_of_the_seeds_ratios(compared: tuple[Path, list[joint.Arm]]) -> None:
    one, other = compared[1]
    arms = []
    for seed, ratio in enumerate((1.2, 0.9, 1.05)):
        arms += [
            dataclasses.replace(one, seed=seed, volumes=(0.3 * ratio,)),
            dataclasses.replace(other, seed=seed, volumes=(0.3,)),
        ]
    found = joint.summary(arms, "6m")
    assert found["value"] == pytest.approx(1.05)
    assert found["spread"] == pytest.approx([0.9, 1.2])
    assert found["coverage"] == 0.75 and found["seeds"] == 3
    assert found["ratio_compressed_bytes"] == pytest.approx(
        one.flat_volume("compressed_bytes") / other.flat_volume("compressed_bytes")
    )
    with pytest.raises(ValueError, match="no seed has both arms"):
        joint.summary(arms[:1], "6m")


def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_joint_pictures", ROOT / "docs" / "make_joint_pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_three_pictures_are_drawn_from_the_studies(
    compared: tuple[Path, list[joint.Arm]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    module = pictures()
    monkeypatch.setattr(sys, "argv", ["x", "--run", str(compared[0]), "--out", str(tmp_path / "out")])
    assert module.main() == 0
    names = {"joint-loss-latency.png", "joint-loss-bytes.png", "joint-volume.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").iterdir())
    monkeypatch.setattr(sys, "argv", ["x", "--run", str(tmp_path)])
    assert module.main() == 2
    assert "make bench NAME=joint_vs_sequential" in capsys.readouterr().err


def test_flat_volumes_look_at_two_objectives() -> None:
    names = ("nll", "decode_ms_per_token", "compressed_bytes")
    arm = joint.Arm("joint", 0, names, Reference(), ((0.125, 0.55, 1.0), (0.2, 2.0, 0.1)), (1.0,), (0.1,), 1, 1)
    assert arm.flat_volume("decode_ms_per_token") == pytest.approx(1 / 4)
    assert arm.flat_volume("compressed_bytes") == pytest.approx((0.125 * 0.1 + 0.05 * 0.9) / (0.25 * 1.1))
