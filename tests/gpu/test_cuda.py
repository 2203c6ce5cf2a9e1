"""Engines on CUDA, against ONNX Runtime on the CPU. Skipped, with the reason, where CUDA is not present.

Attention of a float32 graph: ONNX Runtime's GroupQueryAttention may have no float32 kernel on CUDA and then stays on the CPU.
Matrices of two machines are summed in other orders, and tensor cores may shorten the factors, so the bar is wider than on one CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from paretune.compression.export.graph import build_model, save_model
from paretune.engines.process.child import EngineChild
from paretune.spaces import Candidate, Format, Layer
from paretune.teachers.checkpoint.teacher import Teacher

pytestmark = pytest.mark.gpu
CUDA = "CUDAExecutionProvider"
BAR = 2e-3
FORMS = {"fp32": Format(), "int4": Format(4, 32, "fp32")}
HAS = {
    "torch": (torch.cuda.is_available(), f"torch {torch.__version__} finds no CUDA device"),
    "onnxruntime": (CUDA in ort.get_available_providers(), f"onnxruntime {ort.__version__} has no {CUDA}"),
}


@pytest.fixture(scope="module", params=HAS)
def engine(request: pytest.FixtureRequest) -> Iterator[EngineChild]:
    present, reason = HAS[request.param]
    if not present:
        pytest.skip(reason)
    with EngineChild(1, engine=request.param) as child:
        yield child


def logits(child: EngineChild, model: Path, provider: str, ids: np.ndarray, **more: int) -> np.ndarray:
    child.ask(do="load", path=str(model), threads=1, provider=provider)
    np.save(model.parent / "ids.npy", ids)
    child.ask(do="logits", ids=str(model.parent / "ids.npy"), out=str(model.parent / "out.npy"), **more)
    return np.asarray(np.load(model.parent / "out.npy"))


@pytest.mark.parametrize("name", FORMS)
def test_cuda_gives_the_logits_of_the_cpu(
    name: str, engine: EngineChild, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    form, ids = FORMS[name], np.random.default_rng(0).integers(0, 288, (2, 24))
    candidate = Candidate((Layer(128, 2, form, form),) * 3, form, form)
    model = tmp_path / "model.onnx"
    save_model(build_model(tiny_teacher.weights(), candidate, tiny_teacher.config, tiny_teacher.shape), model)
    with EngineChild(1) as cpu:
        expected = logits(cpu, model, "CPUExecutionProvider", ids)
    assert np.abs(logits(engine, model, CUDA, ids) - expected).max() <= BAR
    assert np.abs(logits(engine, model, CUDA, ids, prompt=5) - expected).max() <= BAR
    assert np.abs(logits(engine, model, CUDA, ids[::-1].copy()) - expected).max() > 10 * BAR, "control"


def test_generation_on_cuda_is_timed(engine: EngineChild, tiny_teacher: Teacher, tmp_path: Path) -> None:
    candidate = Candidate((Layer(128, 2),) * 3)
    model = tmp_path / "model.onnx"
    save_model(build_model(tiny_teacher.weights(), candidate, tiny_teacher.config, tiny_teacher.shape), model)
    engine.ask(do="load", path=str(model), threads=1, provider=CUDA)
    timed = engine.ask(do="time", prompt=16, tokens=5, batch=4)
    assert len(timed["step_ms"]) == 5
    assert all(x > 0 for x in (*timed["step_ms"], timed["ttft_ms"]))
