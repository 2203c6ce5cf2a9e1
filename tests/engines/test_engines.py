"""What every engine must do with an artifact's graph. The engines are discovered, so a new one is held to all of this.

ONNX Runtime is the reference (test_export_parity.py holds it against torch's own model); others must give its logits within BAR,
and would not with one weight moved.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from paretune.common.errors import EnvironmentProblem, Infeasible, UsageError
from paretune.compression.calibration.calibrated import calibrated_codes
from paretune.compression.export.graph import build_model, save_model
from paretune.compression.network.student import NO_CODES, Network
from paretune.compression.prune.structure import Importance, slice_weights
from paretune.engines.catalog import ENGINES, engine_module
from paretune.engines.process.child import EngineChild
from paretune.spaces import Candidate, Format, Layer
from paretune.spaces.candidate import FP32
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher

BAR = 1e-4
INT4, INT8, INT2 = Format(4, 32, "fp32"), Format(8, 32, "fp32"), Format(2, 32, "fp32")
FP16, BF16 = Format(16), Format(16, half="bf16")
MOVED = "model.layers.1.self_attn.v_proj.weight"
Logits = npt.NDArray[np.float32]


def uniform(form: Format, tables: Format | None = None) -> Candidate:
    other = form if tables is None else tables
    return Candidate((Layer(128, 2, form, form),) * 3, other, other)


FLOAT = {  # activations are floats
    "fp32": uniform(FP32),
    "int4, one table": uniform(INT4),
    "every format": Candidate((Layer(128, 2, INT4, FP16), Layer(128, 2, BF16, INT8), Layer(128, 2, INT2)), INT8, INT4),
    "every width": Candidate((Layer(128, 2), Layer(32, 1, INT4), Layer(64, 2, FP32, INT4)), FP16, INT4),
}
ROUNDED = {  # by MatMulNBits itself
    "int4/int8": uniform(Format(4, 32, "int8")),
    "int8/int8": uniform(Format(8, 32, "int8")),
}
PER_TENSOR = {  # in standard operators; one scale for a tensor, so a rounding that falls the other way is a whole step
    "dynamic": uniform(Format(8, 0, "dynamic"), FP32),
    "static": uniform(Format(8, 0, "static"), FP32),
}


class Running:
    """An engine in its child, with a folder for what goes back and forth."""

    def __init__(self, name: str, child: EngineChild, folder: Path) -> None:
        self.name, self.child, self.folder = name, child, folder

    def load(self, path: Path, **more: Any) -> dict[str, Any]:
        return self.child.ask(do="load", path=str(path), threads=1, engine=self.name, **more)

    def logits(self, ids: npt.NDArray[np.int64], **more: Any) -> Logits:
        np.save(self.folder / "ids.npy", ids)
        self.child.ask(do="logits", ids=str(self.folder / "ids.npy"), out=str(self.folder / "out.npy"), **more)
        found: Logits = np.load(self.folder / "out.npy")
        return found

    def run(self, path: Path, ids: npt.NDArray[np.int64]) -> Logits:
        self.load(path)
        return self.logits(ids)


def start(name: str, folder: Path) -> Iterator[Running]:
    if importlib.util.find_spec(ENGINES[name].library) is None:
        pytest.skip(f"the engine {name} is not installed: {ENGINES[name].install}")
    with EngineChild(1, engine=name) as child:
        yield Running(name, child, folder)


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from start(request.param, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from start("onnxruntime", tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def ids() -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 288, (3, 24))


@pytest.fixture(scope="module")
def teachers(
    tiny_teacher: Teacher, write_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Teacher]:
    folder = tmp_path_factory.mktemp("teachers")
    others = {f: load_teacher(str(write_teacher(folder / f, family=f))) for f in ("gpt2", "qwen2", "qwen3")}
    return {"llama": tiny_teacher, **others}


@pytest.fixture(scope="module")
def built(teachers: dict[str, Teacher], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`built(candidate, family="llama", moved=False)`: the path of its model; `moved`: with one weight that is wrong."""
    folder, made = tmp_path_factory.mktemp("models"), dict[tuple[Any, ...], Path]()

    def build(candidate: Candidate, family: str = "llama", moved: bool = False) -> Path:
        key = (candidate, family, moved)
        if key not in made:
            made[key] = folder / f"{len(made)}.onnx"
            save_model(model_of(candidate, teachers[family], moved), made[key])
        return made[key]

    return build


def model_of(candidate: Candidate, teacher: Teacher, moved: bool = False) -> onnx.ModelProto:
    shape, weights = teacher.shape, dict(teacher.weights())
    if moved:
        weights[MOVED] = weights[MOVED].clone()
        weights[MOVED][3, 5] += weights[MOVED].abs().max()
    order = Importance(
        tuple(tuple(range(shape.ffn)) for _ in range(shape.layers)),
        (tuple(range(shape.kv_heads)),) * shape.layers,
        (0, 2, 1),
    )
    weights = slice_weights(weights, candidate, order, shape)
    codes = NO_CODES
    if any(layer.attention_format.activation == "static" for layer in candidate.layers):
        text = torch.from_numpy(np.random.default_rng(1).integers(0, 288, (8, 64)))
        codes = calibrated_codes(Network(teacher.config, shape, 3), weights, candidate, text)
    return build_model(weights, candidate, teacher.config, shape, codes)


def worst(a: Logits, b: Logits) -> float:
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def typical(a: Logits, b: Logits) -> float:
    """The median over positions of the largest difference. Sums in another order differ by 1e-6, and where that carries a value over
    the middle between two codes, its position and the later ones of its row are off by a step of the rounding: no error."""
    assert a.shape == b.shape
    return float(np.median(np.abs(a - b).max(-1)))


def test_the_catalog_has_every_engine() -> None:
    modules = {f"{path.parent.name}.decoder" for path in (Path(__file__).parents[2] / "engines").glob("*/decoder.py")}
    assert modules == {engine.module for engine in ENGINES.values()}


class TestEngine:
    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3"])
    @pytest.mark.parametrize("name", FLOAT)
    def test_logits_are_those_of_the_reference(
        self,
        engine: Running,
        reference: Running,
        built: Callable[..., Path],
        ids: npt.NDArray[np.int64],
        name: str,
        family: str,
    ) -> None:
        expected = reference.run(built(FLOAT[name], family), ids)
        assert worst(engine.run(built(FLOAT[name], family), ids), expected) <= BAR
        assert worst(engine.run(built(FLOAT[name], family, moved=True), ids), expected) > 10 * BAR, "control"

    @pytest.mark.parametrize("name", ROUNDED)
    def test_8_bit_activations_are_as_the_catalog_says(
        self, engine: Running, reference: Running, built: Callable[..., Path], ids: npt.NDArray[np.int64], name: str
    ) -> None:
        form = ROUNDED[name].head_format
        as_floats = built(uniform(Format(form.bits, form.group_size, "fp32")))
        found = engine.run(built(ROUNDED[name]), ids)
        rounded, not_rounded = reference.run(built(ROUNDED[name]), ids), reference.run(as_floats, ids)
        if ENGINES[engine.name].reads_accuracy_level:
            assert typical(found, rounded) <= BAR < typical(found, not_rounded) / 10
        else:
            assert worst(found, not_rounded) <= BAR < typical(found, rounded) / 10

    @pytest.mark.parametrize("name", PER_TENSOR)
    def test_8_bit_activations_of_standard_operators_are_rounded(
        self, engine: Running, reference: Running, built: Callable[..., Path], ids: npt.NDArray[np.int64], name: str
    ) -> None:
        """One row at a time: a dynamic scale depends on what else is in the batch."""
        row = ids[:1]
        found, expected = (e.run(built(PER_TENSOR[name]), row) for e in (engine, reference))
        assert typical(found, expected) <= BAR
        plain = uniform(Format(8, 0, "fp32"), FP32)
        assert typical(found, reference.run(built(plain), row)) > 10 * BAR, "control: activations as floats"

    def test_rows_of_a_batch_do_not_see_each_other(
        self, engine: Running, built: Callable[..., Path], ids: npt.NDArray[np.int64]
    ) -> None:
        together = engine.run(built(FLOAT["every format"]), ids)
        assert worst(together, np.concatenate([engine.logits(row[None]) for row in ids])) <= BAR
        assert worst(together, together[[1, 2, 0]]) > 10 * BAR, "control"

    @pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
    @pytest.mark.parametrize("prompt", [1, 7])
    def test_decoding_through_the_kv_cache_is_one_forward(
        self, engine: Running, built: Callable[..., Path], ids: npt.NDArray[np.int64], family: str, prompt: int
    ) -> None:
        whole = engine.run(built(FLOAT["int4, one table"], family), ids)
        assert worst(engine.logits(ids, prompt=prompt), whole) <= BAR
        other = ids.copy()
        other[:, 0] = (other[:, 0] + 1) % 288
        assert worst(engine.logits(other, prompt=prompt)[:, -1:], whole[:, -1:]) > 10 * BAR, "control: the past is seen"

    def test_generation_is_timed_step_by_step(self, engine: Running, built: Callable[..., Path]) -> None:
        assert engine.load(built(FLOAT["every width"]))["load_ms"] > 0
        for batch in (1, 3):
            timed = engine.child.ask(do="time", prompt=16, tokens=5, batch=batch)
            assert len(timed["step_ms"]) == 5
            assert all(0 < x < 60_000 for x in (*timed["step_ms"], timed["ttft_ms"]))

    def test_its_memory_is_that_of_the_kernel(self, engine: Running, built: Callable[..., Path]) -> None:
        engine.load(built(FLOAT["fp32"]))
        said = engine.child.ask(do="memory")["peak_bytes"]
        status = Path(f"/proc/{engine.child.pid}/status").read_text().splitlines()
        peak = int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024
        assert 20_000_000 < said <= peak <= said + 4_000_000

    def test_the_child_imports_its_own_engine_only(self, engine: Running, built: Callable[..., Path]) -> None:
        """By the shared objects that it has mapped."""
        engine.load(built(FLOAT["fp32"]))
        mapped = Path(f"/proc/{engine.child.pid}/maps").read_text()
        for name, other in ENGINES.items():
            assert (f"/{other.library}/" in mapped) == (name == engine.name), name

    @pytest.mark.parametrize("damage", ["empty", "text", "cut", "missing", "unknown op"])
    def test_a_file_that_is_no_model_is_infeasible_and_the_child_goes_on(
        self, engine: Running, built: Callable[..., Path], tmp_path: Path, damage: str
    ) -> None:
        whole, path = built(FLOAT["fp32"]), tmp_path / "broken.onnx"
        if damage in ("empty", "text", "cut"):
            path.write_bytes({"empty": b"", "text": b"no model", "cut": whole.read_bytes()[:-5000]}[damage])
        elif damage == "unknown op":
            model = onnx.load(whole)
            next(n for n in model.graph.node if n.name == "/model/layers.1/mlp/up_proj").op_type = "OfTomorrow"
            onnx.save(model, path)
        with pytest.raises(Infeasible) as caught:
            engine.load(path)
        assert "the engine refused to load" in caught.value.problem
        if damage == "unknown op":
            assert "OfTomorrow" in caught.value.problem
        engine.load(whole)
        assert engine.child.ask(do="time", prompt=4, tokens=1)["step_ms"]

    def test_a_module_of_a_plug_in_is_refused_or_run(self, engine: Running, tmp_path: Path) -> None:
        value = [onnx.helper.make_tensor_value_info(n, 1, [2, 3]) for n in ("input0", "output0")]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Sigmoid", ["input0"], ["output0"])], "g", *[[v] for v in value]
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        onnx.helper.set_model_props(model, {"paretune.module": "test"})
        onnx.save(model, tmp_path / "module.onnx")
        if engine.name == "onnxruntime":
            engine.load(tmp_path / "module.onnx")
            with pytest.raises(Infeasible, match="in the batch of its graph"):
                engine.child.ask(do="time", prompt=1, tokens=1, batch=2)
        else:
            with pytest.raises(Infeasible, match="this graph has input0"):
                engine.load(tmp_path / "module.onnx")

    def test_a_provider_that_is_not_there_is_said_with_what_to_install(
        self, engine: Running, built: Callable[..., Path]
    ) -> None:
        if engine.name == "torch" and torch.cuda.is_available():
            pytest.skip("torch has CUDA here")
        provider = "MIGraphXExecutionProvider" if engine.name == "onnxruntime" else "CUDAExecutionProvider"
        with pytest.raises(EnvironmentProblem) as caught:
            engine.load(built(FLOAT["fp32"]), provider=provider)
        assert provider in caught.value.problem
        assert "install" in caught.value.remedy or "execution_provider" in caught.value.remedy
        with pytest.raises((UsageError, EnvironmentProblem), match="NoSuchProvider"):
            engine.load(built(FLOAT["fp32"]), provider="NoSuchProvider")


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_not_installed_says_how_to_install_it(
    name: str, built: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    (tmp_path / f"{ENGINES[name].library}.py").write_text("raise ImportError('it is hidden by this test')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    with EngineChild(1, engine=name) as child, pytest.raises(EnvironmentProblem) as caught:
        child.ask(do="load", path=str(built(FLOAT["fp32"])), threads=1)
    assert caught.value.problem == f"the engine {name} cannot be imported: it is hidden by this test"
    assert caught.value.remedy == ENGINES[name].install


def test_an_engine_that_is_none_is_named(built: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"no engine is called 'abacus'; known: onnxruntime, openvino, torch"):
        engine_module("abacus")
    with EngineChild(1, engine="abacus") as child, pytest.raises(UsageError, match="abacus"):
        child.ask(do="load", path=str(built(FLOAT["fp32"])), threads=1)
