"""An engine may crash, hang or refuse: the search must hear Infeasible, and no child may outlive its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretune.common.errors import Infeasible
from paretune.compression.export.graph import build_model, save_model
from paretune.engines.process.child import EngineChild
from paretune.spaces import Candidate, Format, Layer
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.tokens import TokenSplit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Teacher) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.onnx"
    form = Format(4, 32, "fp32")
    candidate = Candidate((Layer(128, 2, form, form),) * 3, form, form)
    save_model(build_model(tiny_teacher.weights(), candidate, tiny_teacher.config, tiny_teacher.shape), path)
    return path


@pytest.fixture
def child() -> Iterator[EngineChild]:
    with EngineChild(1) as engine:
        yield engine


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_model_is_loaded_timed_and_weighed(child: EngineChild, model: Path) -> None:
    empty = child.ask(do="memory")["peak_bytes"]
    assert child.ask(do="load", path=str(model), threads=1)["load_ms"] > 0
    timed = child.ask(do="time", prompt=16, tokens=5)
    assert len(timed["step_ms"]) == 5
    assert all(x > 0 for x in (*timed["step_ms"], timed["ttft_ms"]))
    assert child.ask(do="memory")["peak_bytes"] > empty > 10_000_000


def test_the_peak_is_that_of_the_kernel(child: EngineChild) -> None:
    said = child.ask(do="memory")["peak_bytes"]
    status = dict(line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines())
    assert said <= int(status["VmHWM"].split()[0]) * 1024 <= said + 2_000_000


def test_a_crash_is_infeasible_and_says_how_it_ended(child: EngineChild, model: Path) -> None:
    child.ask(do="load", path=str(model), threads=1)
    os.kill(child.pid, signal.SIGKILL)
    for _ in range(2):  # and again: a dead engine stays dead, politely
        with pytest.raises(Infeasible, match=r"the engine died: exit status -9"):
            child.ask(do="time", prompt=4, tokens=1)


def test_a_crash_in_the_middle_of_a_request_is_infeasible(child: EngineChild, model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.ones((40_000, 64), np.int64))  # many seconds of work
    np.save(tmp_path / "targets.npy", np.full(40_000, 63))
    child.ask(do="load", path=str(model), threads=1)
    killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.3; kill -SEGV {child.pid}"])
    try:
        with pytest.raises(Infeasible, match="the engine died"):
            child.ask(
                do="score",
                ids=str(tmp_path / "ids.npy"),
                targets=str(tmp_path / "targets.npy"),
                nll=str(tmp_path / "nll.npy"),
            )
    finally:
        killer.wait()


def test_a_hang_is_infeasible_within_the_timeout_and_the_child_is_gone(child: EngineChild) -> None:
    child.ask(do="memory")
    os.kill(child.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(Infeasible, match="no answer within 1 s"):
        child.ask(do="memory", timeout_s=1.0)
    assert time.monotonic() - start < 30  # a bound against waiting for ever, not a speed
    with pytest.raises(Infeasible):
        child.ask(do="memory", timeout_s=20.0)
    assert not alive(child.pid)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "missing", "unknown op", "bad block size"])
def test_a_broken_file_is_infeasible_and_the_child_goes_on(
    child: EngineChild, model: Path, tmp_path: Path, damage: str
) -> None:
    import onnx

    path = tmp_path / "broken.onnx"
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("this is no model")
    elif damage == "cut":
        path.write_bytes(model.read_bytes()[:-5000])
    elif damage in ("unknown op", "bad block size"):
        loaded = onnx.load(model)
        node = next(n for n in loaded.graph.node if n.op_type == "MatMulNBits")
        if damage == "unknown op":
            node.op_type = "NoSuchOperator"
        else:
            next(a for a in node.attribute if a.name == "block_size").i = 24
        onnx.save(loaded, path)
    with pytest.raises(Infeasible) as caught:
        child.ask(do="load", path=str(path), threads=1)
    expected = {"unknown op": "NoSuchOperator", "bad block size": "MatMulNBits"}.get(
        damage, "broken.onnx" if damage != "empty" else "load"
    )
    assert expected in str(caught.value)
    child.ask(do="load", path=str(model), threads=1)
    assert child.ask(do="time", prompt=4, tokens=1)["step_ms"]


def test_nonsense_requests_are_answered(child: EngineChild) -> None:
    for request, words in (
        ({"do": "time", "prompt": 1, "tokens": 1}, "no model is loaded"),
        ({"do": "dance"}, "no model is loaded"),
    ):
        with pytest.raises(Infeasible, match=words):
            child.ask(**request)


def test_what_a_library_prints_never_gets_between_the_answers(tmp_path: Path) -> None:
    """File descriptor 1 of the child is its stderr by the time a model runs."""
    program = textwrap.dedent("""
        import os, sys
        from paretune.engines.process import worker
        def answer(self, request):
            os.write(1, b"noise from C\\n")
            print("noise from Python", flush=True)
            return {"fine": 1}
        worker.Server.answer = answer
        worker.main()
        """)
    done = subprocess.run(
        [sys.executable, "-c", program], input=b'{"do": "x"}\n{"do": "y"}\n', capture_output=True, timeout=240
    )
    assert done.stdout == b'{"ok": true, "fine": 1}\n' * 2
    assert done.stderr.count(b"noise") == 4


def test_the_child_dies_with_its_parent_even_if_it_is_stuck() -> None:
    """Stopped, it cannot notice that its input has ended: only the kernel's parent-death signal ends it."""
    program = textwrap.dedent("""
        import time
        from paretune.engines.process.child import EngineChild
        child = EngineChild(1)
        child.ask(do="memory")
        print(child.pid, flush=True)
        time.sleep(60)
        """)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 120
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    survived = alive(pid)
    if survived:
        os.kill(pid, signal.SIGKILL)
    assert not survived


def test_closing_ends_the_child_even_if_it_is_stuck() -> None:
    engine = EngineChild(1)
    engine.ask(do="memory")
    os.kill(engine.pid, signal.SIGSTOP)
    engine.close()
    assert not alive(engine.pid)


def test_the_worker_loads_no_training_library() -> None:
    program = (
        "import sys, paretune.engines.process.worker as w; w.engine_module(w.DEFAULT); "
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    loaded = set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )
    assert {"numpy", "onnxruntime"} <= loaded
    assert not loaded & {"torch", "transformers", "onnx", "scipy", "pandas", "ray", "mlflow", "optuna", "safetensors"}


class Scoring:
    """Scores windows in the child and in torch."""

    def __init__(self, child: EngineChild, model: Path, folder: Path, ids: np.ndarray, targets: np.ndarray) -> None:
        self.child, self.folder = child, folder
        np.save(folder / "ids.npy", ids)
        np.save(folder / "targets.npy", targets)
        child.ask(do="load", path=str(model), threads=1)

    def ask(self, **request: Any) -> dict[str, np.ndarray]:
        files: dict[str, Any] = {
            name: str(self.folder / f"{name}.npy") for name in ("ids", "targets", "nll", "kl", "agree")
        }
        self.child.ask(do="score", **files, **request)
        return {name: np.load(files[name]) for name in ("nll", "kl", "agree") if Path(files[name]).exists()}


def test_scores_are_those_of_a_slow_sum_and_padding_counts_nothing(
    child: EngineChild, model: Path, tmp_path: Path, tiny_tokens: dict[str, TokenSplit]
) -> None:
    windows = tiny_tokens["search"].windows(24)
    ids, targets = windows.ids[-5:].copy(), windows.targets[-5:].copy()
    targets[1] = 3
    np.save(tmp_path / "raw.npy", ids)
    scoring = Scoring(child, model, tmp_path, ids, targets)
    child.ask(do="logits", ids=str(tmp_path / "raw.npy"), out=str(tmp_path / "logits.npy"))
    log_probs = torch.from_numpy(np.load(tmp_path / "logits.npy")).double().log_softmax(-1)
    expected = [-sum(float(log_probs[i, j, ids[i, j + 1]]) for j in range(n)) for i, n in enumerate(targets)]
    found = scoring.ask(save_reference=str(tmp_path / "reference.npy"), reference_windows=3)
    assert found["nll"] == pytest.approx(expected, rel=1e-5)
    assert "kl" not in found
    ids[1, 4:] = 7  # beyond the third target of window 1
    again = Scoring(child, model, tmp_path, ids, targets).ask(
        reference=str(tmp_path / "reference.npy"), reference_windows=3
    )
    assert again["nll"] == pytest.approx(expected, rel=1e-5)
    assert again["kl"] == pytest.approx([0, 0, 0], abs=1e-4)
    assert again["agree"].tolist() == targets[:3].tolist()


def test_distance_to_a_reference_is_the_explicit_kl(child: EngineChild, model: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 288, (3, 10))
    targets = np.array([9, 4, 9])
    reference = torch.randn(2, 9, 288, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    np.save(tmp_path / "reference.npy", reference.numpy())
    scoring = Scoring(child, model, tmp_path, ids, targets)
    found = scoring.ask(reference=str(tmp_path / "reference.npy"), reference_windows=2)
    child.ask(do="logits", ids=str(tmp_path / "ids.npy"), out=str(tmp_path / "logits.npy"))
    mine = torch.from_numpy(np.load(tmp_path / "logits.npy"))[:, :-1].double().log_softmax(-1)
    for i in range(2):
        n = int(targets[i])
        p = reference[i, :n].double()
        assert found["kl"][i] == pytest.approx(float((p.exp() * (p - mine[i, :n])).sum()), rel=1e-4)
        assert found["agree"][i] == int((p.argmax(-1) == mine[i, :n].argmax(-1)).sum())


def test_scoring_in_slices_is_scoring_at_once(
    child: EngineChild, model: Path, tmp_path: Path, tiny_tokens: dict[str, TokenSplit]
) -> None:
    windows = tiny_tokens["search"].windows(24)
    scoring = Scoring(child, model, tmp_path, windows.ids[:9], windows.targets[:9])
    whole = scoring.ask(save_reference=str(tmp_path / "whole.npy"), reference_windows=5)["nll"]
    for start, stop in ((0, 2), (2, 7), (7, 9)):
        scoring.ask(save_reference=str(tmp_path / "sliced.npy"), reference_windows=5, start=start, stop=stop)
    assert np.load(tmp_path / "nll.npy") == pytest.approx(whole, rel=1e-6)
    assert np.allclose(np.load(tmp_path / "sliced.npy"), np.load(tmp_path / "whole.npy"), atol=1e-4)
    other = tmp_path / "other.npy"
    np.save(other, np.roll(np.load(tmp_path / "whole.npy"), 1, axis=0))
    once = scoring.ask(reference=str(other), reference_windows=5)
    for start, stop in ((0, 4), (4, 9)):
        sliced = scoring.ask(reference=str(other), reference_windows=5, start=start, stop=stop)
    assert once["kl"].min() > 0.01
    for name in ("nll", "kl", "agree"):
        assert sliced[name] == pytest.approx(once[name], rel=1e-4)
    scoring.ask(start=0, stop=4)
    assert not np.load(tmp_path / "nll.npy")[4:].any(), "a slice that is left out would be seen"
