"""A model too large for the memory it is given ends as Infeasible with the reason, not in the kernel's hands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from paretune.common.errors import Infeasible
from paretune.compression.export.graph import build_model, save_model
from paretune.engines.catalog import ENGINES
from paretune.engines.process.child import EngineChild
from paretune.spaces import Candidate, Layer
from paretune.teachers.checkpoint.teacher import Teacher

SPARE = 32 * 2**20
LARGE: dict[str, Any] = {"do": "time", "prompt": 128, "tokens": 1, "batch": 256}  # its logits alone are 37 MB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Teacher) -> Path:
    path = tmp_path_factory.mktemp("memory") / "model.onnx"
    candidate = Candidate((Layer(128, 2),) * 3)
    save_model(build_model(tiny_teacher.weights(), candidate, tiny_teacher.config, tiny_teacher.shape), path)
    return path


def data_bytes(pid: int) -> int:
    """What RLIMIT_DATA counts."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmData"))) * 1024


@pytest.mark.parametrize("name", ENGINES)
def test_an_allocation_beyond_the_limit_is_infeasible(name: str, model: Path) -> None:
    if importlib.util.find_spec(ENGINES[name].library) is None:
        pytest.skip(f"the engine {name} is not installed: {ENGINES[name].install}")
    with EngineChild(1, engine=name) as child:
        child.ask(do="load", path=str(model), threads=1)
        child.ask(do="time", prompt=128, tokens=1)
        needed = data_bytes(child.pid)
        assert child.ask(**LARGE)["step_ms"], "control: without a limit it runs"
    limit = needed + SPARE
    with EngineChild(1, engine=name, memory_bytes=limit) as child:
        child.ask(do="load", path=str(model), threads=1)
        assert child.ask(do="time", prompt=128, tokens=1)["step_ms"]
        with pytest.raises(Infeasible) as caught:
            child.ask(**LARGE)
        assert f"its memory is limited to {limit / 2**20:,.0f} MiB" in caught.value.problem
