"""Every precision beside plain int8 and int4 groups: slow oracles of the rounding, whole models in ONNX Runtime, and the space."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paretune.common.errors import UsageError
from paretune.compression.calibration.calibrated import calibrated_codes
from paretune.compression.export.graph import build_model, save_model
from paretune.compression.export.graph_builder import pack
from paretune.compression.network.student import ATTENTION, FFN, NO_CODES, Codes, Network, quantized_weights
from paretune.compression.prune import mask_for
from paretune.compression.quantize import Quantized, fake_quantize, quantize
from paretune.compression.quantize.clip import search_scales
from paretune.compression.quantize.half import to_half
from paretune.compression.quantize.per_tensor import (
    CLIPPINGS,
    fake_quantize_dynamic,
    fake_quantize_static,
    static_scale,
)
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles.kernels import ONNXRUNTIME_CPU
from paretune.search.spec import make_spec
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape, Space
from paretune.spaces.candidate import DENSE, FP32, Activation, block_for, group_for
from paretune.spaces.precision import KERNELS_OF, PrecisionChoices
from paretune.spaces.space import PATTERNS, RATIOS
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher

Weights = dict[str, torch.Tensor]
BAR = 1e-4
SPARSE = Pattern("2:4", 0.5)
OLD_KERNELS = ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32")


def random_matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


# the rounding, against slow loops


def slow_bf16(value: float) -> float:
    """Round a float32 to the nearest with 16 bits less, ties to even, on its integer representation."""
    bits = struct.unpack("I", struct.pack("f", value))[0]
    below = bits & ~0xFFFF
    candidates = [float(struct.unpack("f", struct.pack("I", b))[0]) for b in (below, below + 0x10000)]
    distances = [abs(value - c) for c in candidates]
    if distances[0] == distances[1]:
        return candidates[0] if (below >> 16) % 2 == 0 else candidates[1]
    return float(candidates[distances.index(min(distances))])


def test_16_bit_weights_are_those_of_the_slow_loop() -> None:
    weight = torch.cat([random_matrix(8, 64).flatten(), torch.tensor([0.0, 1 + 2**-9, 1 + 3 * 2**-9, 6e-8, 65504.0])])
    halves = [struct.unpack("e", struct.pack("e", v))[0] for v in weight.tolist()]
    assert to_half(weight, "fp16").tolist() == halves
    assert to_half(weight, "bf16").tolist() == [slow_bf16(v) for v in weight.tolist()]
    assert halves != weight.tolist() and halves != [slow_bf16(v) for v in weight.tolist()]
    assert torch.equal(fake_quantize(weight, Format(16)), to_half(weight, "fp16").float())


def test_a_weight_beyond_the_range_of_fp16_is_named() -> None:
    weight = torch.tensor([1.0, 70_000.0])
    with pytest.raises(ValueError, match=r"at most 65504 in fp16, but got 70000; use bf16"):
        to_half(weight, "fp16")
    assert to_half(weight, "bf16").isfinite().all()


def slow_quantize(row: list[float], bits: int) -> tuple[list[int], float]:
    """One group: the entry of largest magnitude becomes -2^(bits-1)."""
    top = 2 ** (bits - 1)
    scale = single(max(row, key=lambda v: (abs(v), -v)) / -top) or 2.0**-20
    return [min(top - 1, max(-top, round(single(v / scale)))) for v in row], scale


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("k", [48, 160, 512])
def test_per_channel_is_one_group_a_row(bits: int, k: int) -> None:
    weight = random_matrix(5, k)
    weight[3] = 0
    found = quantize(weight, Format(bits, 0))  # type: ignore[arg-type]
    rows = [slow_quantize(row, bits) for row in weight.tolist()]
    assert found.group_size == k
    assert found.codes.tolist() == [codes for codes, _ in rows]
    assert found.scales.tolist() == [[scale] for _, scale in rows]
    assert (quantize(weight, Format(bits, 16)).codes != found.codes).any(), "control: groups of 16"  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [32, 64])
def test_two_bits_are_the_slow_loop_and_four_codes_a_byte(group: int) -> None:
    weight = random_matrix(3, 128)
    found = quantize(weight, Format(2, group))
    for row, codes, scales in zip(weight.tolist(), found.codes.tolist(), found.scales.tolist(), strict=True):
        for g in range(128 // group):
            assert (codes[g * group : (g + 1) * group], scales[g]) == slow_quantize(row[g * group : (g + 1) * group], 2)
    packed = pack(found)
    assert packed.shape == (3, 128 // group, group // 4)
    for row_, column in itertools.product(range(3), range(128)):
        g, inside = divmod(column, group)
        assert ((int(packed[row_, g, inside // 4]) >> (2 * (inside % 4))) & 3) - 2 == int(found.codes[row_, column])


def slow_dynamic(rows: list[list[float]]) -> list[list[float]]:
    """ONNX's DynamicQuantizeLinear, read from its specification."""
    low, high = min(0.0, *(min(r) for r in rows)), max(0.0, *(max(r) for r in rows))
    scale = single((high - low) / 255) or 1.0
    zero = min(255, max(0, round(single(-low / scale))))
    return [[single((min(255, max(0, round(single(v / scale)) + zero)) - zero) * scale) for v in row] for row in rows]


def test_dynamic_activations_are_the_slow_loop_sequence_by_sequence() -> None:
    x = torch.stack([random_matrix(5, 32, 1), 3 + random_matrix(5, 32, 2), torch.zeros(5, 32)])
    expected = torch.tensor([slow_dynamic(sequence.tolist()) for sequence in x])
    assert torch.allclose(fake_quantize_dynamic(x), expected, rtol=1e-6, atol=0)
    assert torch.equal(fake_quantize_dynamic(x[1]), fake_quantize_dynamic(x)[1])
    assert not torch.allclose(fake_quantize_dynamic(x.flatten(0, 1)[None])[0], expected.flatten(0, 1)), (
        "one scale for all"
    )
    assert fake_quantize_dynamic(x.bfloat16()).dtype == torch.bfloat16


def test_dynamic_activations_are_those_of_the_operator() -> None:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    x = random_matrix(40, 96, 3) * torch.rand(40, 1, generator=torch.Generator().manual_seed(0)) + 0.01
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["m", 96]) for n in "xy"]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert torch.allclose(fake_quantize_dynamic(x), torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), atol=1e-8)


def test_static_activations_clip_where_that_loses_least() -> None:
    """Brute force over the clippings; outliers are worth clipping, evenly spread values are not."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 60.0

    def loss(scale: float) -> float:
        rounded = [min(127, max(-128, round(single(v / single(scale))))) * single(scale) for v in x.flatten().tolist()]
        return float(sum((a - b) ** 2 for a, b in zip(rounded, x.flatten().tolist(), strict=True)))

    found = static_scale(x)
    assert found == min((float(x.abs().max()) * c / 127 for c in CLIPPINGS), key=loss)
    assert found < 0.99 * float(x.abs().max()) / 127
    even = torch.linspace(-1, 1, 1001)
    assert static_scale(even) == pytest.approx(1 / 127)
    assert static_scale(torch.zeros(3)) > 0
    assert fake_quantize_static(torch.tensor([0.0, 0.26, -9.0, 9.0]), 0.05).tolist() == pytest.approx(
        [0.0, 0.25, -6.4, 6.35]
    )
    with pytest.raises(ValueError, match="finite"):
        static_scale(torch.tensor([1.0, float("inf")]))


def test_gradients_pass_straight_through() -> None:
    for rounding in (
        fake_quantize_dynamic,
        lambda t: fake_quantize_static(t, 0.01),
        lambda t: fake_quantize(t, Format(16)),
    ):
        x = random_matrix(8, 64, 2).requires_grad_()
        upstream = random_matrix(8, 64, 1)
        rounding(x).backward(upstream)
        assert x.grad is not None and torch.equal(x.grad, upstream)


def loss_of(q: Quantized, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Importance-weighted squared error of every group."""
    error = (q.dequantize() - weight).square() * importance
    return error.view(len(weight), -1, q.group_size).sum(-1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group", [32, 0])
def test_the_scale_search_is_as_good_as_brute_force(bits: int, group: int) -> None:
    """600 scales per group, both signs, nearest codes each: the search must come within 2 % in sum, and gain most of what
    there is to gain over rounding to nearest."""
    weight, form = random_matrix(6, 96, bits), Format(bits, group)  # type: ignore[arg-type]
    importance = torch.rand(96, generator=torch.Generator().manual_seed(1)).exp()
    size, top = group_for(group, 96), 2 ** (bits - 1)
    blocks = weight.view(6, -1, size)
    best = torch.full(blocks.shape[:2], float("inf"))
    for step in range(-300, 301):
        scale = step / 300 * 1.3 * blocks.abs().amax(-1) / top
        if step:
            codes = torch.round(blocks / scale[..., None]).clamp(-top, top - 1)
            error = ((codes * scale[..., None] - blocks).square() * importance.view(1, -1, size)).sum(-1)
            best = torch.minimum(best, error)
    found = loss_of(search_scales(weight, form, importance), weight, importance)
    nearest = loss_of(quantize(weight, form), weight, importance)
    assert float(found.sum()) <= 1.02 * float(best.sum())
    assert (found <= nearest * (1 + 1e-6)).all()
    assert float(best.sum()) < 0.9 * float(nearest.sum()), "control: rounding to nearest is not as good"
    unweighted = loss_of(search_scales(weight, form), weight, importance)
    assert float(unweighted.sum()) > float(found.sum()), "control: without importance"


@given(
    st.integers(1, 4),
    st.integers(1, 6).map(lambda m: 16 * m),
    st.sampled_from([2, 4, 8]),
    st.sampled_from([0, 16, 64]),
    st.booleans(),
    st.integers(0, 50),
)
def test_searched_scales_never_lose_more_and_keep_zeros(
    n: int, k: int, bits: int, group: int, sparse: bool, seed: int
) -> None:
    weight, form = random_matrix(n, k, seed), Format(bits, group)  # type: ignore[arg-type]
    weight = weight * mask_for(weight, Pattern("unstructured", 0.6), None) if sparse else weight
    weight[0] = 0
    importance = torch.rand(k, generator=torch.Generator().manual_seed(seed)) * (seed % 3 > 0)  # also all zero
    found, top = search_scales(weight, form, importance), 2 ** (bits - 1)
    assert (found.codes[weight == 0] == 0).all()
    assert found.scales.isfinite().all() and (found.scales != 0).all()
    assert -top <= int(found.codes.min()) <= int(found.codes.max()) <= top - 1
    plain = loss_of(quantize(weight, form), weight, importance)
    assert (loss_of(found, weight, importance) <= plain * (1 + 1e-5) + 1e-12).all()


def test_the_scale_search_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        search_scales(random_matrix(2, 32), Format(4, 32), torch.full((32,), float("nan")))


# whole models in the engine


def uniform(
    form: Format, head: Format | None = None, embedding: Format | None = None, pattern: Pattern = DENSE
) -> Candidate:
    layer = Layer(128, 2, form, form, pattern)
    return Candidate((layer,) * 3, form if head is None else head, form if embedding is None else embedding)


CHANNEL4, CHANNEL8, INT2 = Format(4, 0), Format(8, 0, "int8"), Format(2, 32)
CLIP2, CLIP4 = Format(2, 32, "fp32", "clip"), Format(4, 64, "fp32", "clip")
FP16, BF16 = Format(16), Format(16, half="bf16")
EXACT = {
    "fp16": uniform(FP16),
    "bf16": uniform(BF16),
    "bf16 layers, fp16 head": uniform(BF16, FP16, FP32),
    "fp16 embedding": uniform(FP32, FP32, FP16),
    "int4 per channel": uniform(CHANNEL4),
    "int8 per channel, fp32 activations": uniform(Format(8, 0)),
    "int4 per channel, fp16 head and embedding": uniform(CHANNEL4, FP16, FP16),
    "int2": uniform(INT2),
    "int2 groups of 64, int8 head": uniform(Format(2, 64), Format(8, 64), Format(2, 64)),
    "int2 per channel": uniform(Format(2, 0)),
    "int2 groups of 16": uniform(Format(2, 16)),
    "2:4 sparse int2": uniform(INT2, pattern=SPARSE),
}
CALIBRATED = {
    "int4 clip": uniform(CLIP4, embedding=FP32),
    "int2 clip": uniform(CLIP2, embedding=Format(2, 32)),
    "int4 per channel clip": uniform(Format(4, 0, "fp32", "clip"), FP32, FP32),
    "int4 per channel GPTQ": uniform(Format(4, 0, "fp32", "gptq"), FP32, FP32),
    "int2 GPTQ, 2:4 sparse": uniform(Format(2, 32, "fp32", "gptq"), FP32, FP32, SPARSE),
    "int2 clip, blocks": uniform(CLIP2, FP32, FP32, Pattern("block", 0.5)),
}
DYNAMIC, STATIC = Format(8, 0, "dynamic"), Format(8, 0, "static")
ROUNDED = {
    "int8 per channel": uniform(CHANNEL8),
    "int4 per channel": uniform(Format(4, 0, "int8")),
    "int2/int8": uniform(Format(2, 32, "int8")),
    "int2/int8 in blocks of 16 rounds no activations": uniform(Format(2, 16, "int8")),
    "dynamic": uniform(DYNAMIC, embedding=Format(8, 32)),
    "static": uniform(STATIC, embedding=Format(8, 32)),
    "dynamic GPTQ, static head": uniform(Format(8, 0, "dynamic", "gptq"), STATIC, FP16),
    "static clip, 2:4 sparse": uniform(Format(8, 0, "static", "clip"), FP32, FP32, SPARSE),
}


@pytest.fixture(scope="module", params=["tied", "qwen2", "qwen3"])
def teacher(
    request: pytest.FixtureRequest,
    tiny_teacher: Teacher,
    write_teacher: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Teacher:
    if request.param == "tied":
        return tiny_teacher
    return load_teacher(str(write_teacher(tmp_path_factory.mktemp("model") / "model", family=request.param)))


@pytest.fixture(scope="module")
def child() -> Iterator[EngineChild]:
    with EngineChild(1) as engine:
        yield engine


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 288, (2, 48))


def student_weights(teacher: Teacher, candidate: Candidate) -> Weights:
    found = teacher.weights()
    for i, layer in enumerate(candidate.layers):
        for name in (*ATTENTION, *FFN):
            full = f"model.layers.{i}.{name}.weight"
            found[full] = found[full] * mask_for(found[full], layer.pattern, None)
    return found


def calibrated(teacher: Teacher, candidate: Candidate) -> tuple[Weights, dict[str, Quantized]]:
    weights = student_weights(teacher, candidate)
    text = torch.from_numpy(np.random.default_rng(1).integers(0, 288, (8, 64)))
    return weights, calibrated_codes(Network(teacher.config, teacher.shape, 3), weights, candidate, text)


def in_torch(
    weights: Weights, candidate: Candidate, teacher: Teacher, ids: np.ndarray, codes: Codes = NO_CODES
) -> torch.Tensor:
    network = Network(teacher.config, teacher.shape, 3)
    with torch.no_grad(), network.activations(candidate, codes):
        return network(quantized_weights(weights, candidate, codes), torch.from_numpy(ids))


def in_engine(
    child: EngineChild, folder: Path, model: onnx.ModelProto, ids: np.ndarray, one_by_one: bool = False
) -> torch.Tensor:
    """Logits of all sequences at once, or each in a run of its own."""
    save_model(model, folder / "model.onnx")
    child.ask(do="load", path=str(folder / "model.onnx"), threads=1)
    found = []
    for batch in ids[:, None] if one_by_one else [ids]:
        np.save(folder / "ids.npy", batch)
        child.ask(do="logits", ids=str(folder / "ids.npy"), out=str(folder / "out.npy"))
        found.append(torch.from_numpy(np.load(folder / "out.npy")))
    return torch.cat(found)


def one_weight_moved(weights: Weights) -> Weights:
    name = "model.layers.1.self_attn.v_proj.weight"
    value = weights[name].clone()
    value[3, 5] += value.abs().max()
    return {**weights, name: value}


def changed(candidate: Candidate, change: Callable[[Format], Format]) -> Candidate:
    layers = tuple(
        dataclasses.replace(x, attention_format=change(x.attention_format), ffn_format=change(x.ffn_format))
        for x in candidate.layers
    )
    return Candidate(layers, change(candidate.head_format), change(candidate.embedding_format))


def coarser(form: Format) -> Format:
    """The nearest format that is wrong: the other 16-bit type, half the bits, or the other group size."""
    if form.bits == 32:
        return form
    if form.bits == 16:
        return dataclasses.replace(form, half="bf16" if form.half == "fp16" else "fp16")
    if form.bits == 2:
        return Format(2, 32 if form.group_size == 0 else 0)
    return Format(4 if form.bits == 8 else 2, form.group_size)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("candidate", EXACT.values(), ids=EXACT)
def test_the_shipped_graph_computes_the_searched_student(
    candidate: Candidate, teacher: Teacher, child: EngineChild, tmp_path: Path, ids: np.ndarray
) -> None:
    weights = student_weights(teacher, candidate)
    shipped = in_engine(child, tmp_path, build_model(weights, candidate, teacher.config, teacher.shape), ids)
    assert worst(shipped, in_torch(weights, candidate, teacher, ids)) <= BAR
    controls = {
        "one weight moved": in_torch(one_weight_moved(weights), candidate, teacher, ids),
        "fake-quant off": in_torch(weights, uniform(FP32), teacher, ids),
        "one step coarser": in_torch(weights, changed(candidate, coarser), teacher, ids),
    }
    for name, other in controls.items():
        assert worst(shipped, other) > 10 * BAR, f"the control {name!r} passed"


@pytest.mark.parametrize("candidate", CALIBRATED.values(), ids=CALIBRATED)
def test_calibrated_codes_are_those_that_ship(
    candidate: Candidate, teacher: Teacher, child: EngineChild, tmp_path: Path, ids: np.ndarray
) -> None:
    weights, codes = calibrated(teacher, candidate)
    shipped = in_engine(child, tmp_path, build_model(weights, candidate, teacher.config, teacher.shape, codes), ids)
    assert worst(shipped, in_torch(weights, candidate, teacher, ids, codes)) <= BAR
    nearest = changed(candidate, lambda form: dataclasses.replace(form, algorithm="rtn"))
    name = sorted(codes)[0]
    row = codes[name].codes.clone()
    row[3] = torch.where(row[3] > 0, row[3] - 1, row[3] + 1)
    moved = {**codes, name: dataclasses.replace(codes[name], codes=row)}
    controls = {
        "rounded to nearest": in_torch(weights, nearest, teacher, ids),
        "one row a step off": in_torch(weights, candidate, teacher, ids, moved),
        "fake-quant off": in_torch(weights, uniform(FP32), teacher, ids),
    }
    for control, other in controls.items():
        assert worst(shipped, other) > 10 * BAR, f"the control {control!r} passed"


@pytest.mark.parametrize("candidate", ROUNDED.values(), ids=ROUNDED)
def test_the_shipped_graph_rounds_activations_as_the_searched_student_does(
    candidate: Candidate, teacher: Teacher, child: EngineChild, tmp_path: Path, ids: np.ndarray
) -> None:
    """Positions are counted, because an activation that lies on a rounding tie may fall the other way: see
    test_export_parity.py. Sequences run one by one: a dynamic scale is that of a whole batch."""
    short = ids.reshape(32, 3)
    weights, codes = calibrated(teacher, candidate)
    model = build_model(weights, candidate, teacher.config, teacher.shape, codes)
    shipped = in_engine(child, tmp_path, model, short, one_by_one=True)
    bar = BAR * max(1.0, float(shipped.abs().max()) / 10)

    def agreement(other: torch.Tensor) -> float:
        return float(((shipped - other).abs().amax(-1) <= bar).float().mean())

    def other_activations(form: Format) -> Format:
        other: dict[Activation, Activation] = {"int8": "fp32", "dynamic": "int8", "static": "dynamic", "fp32": "fp32"}
        return dataclasses.replace(form, activation=other[form.activation])

    # The least seen on two of a CPU's paths was 0.875. With four ties expected in 32 sequences, fewer than 0.6 of
    # them agree in 3 of ten million runs.
    assert agreement(in_torch(weights, candidate, teacher, short, codes)) >= 0.6
    controls = {
        "fake-quant off": in_torch(weights, uniform(FP32), teacher, short),
        "one weight moved": in_torch(one_weight_moved(weights), candidate, teacher, short, codes={})
        if not codes
        else None,
        "one step coarser": in_torch(weights, changed(candidate, coarser), teacher, short),
    }
    if candidate != ROUNDED["int2/int8 in blocks of 16 rounds no activations"]:
        controls["other activations"] = in_torch(weights, changed(candidate, other_activations), teacher, short, codes)
    for name, other in controls.items():
        assert other is None or agreement(other) <= 0.1, f"the control {name!r} passed"


def test_rows_longer_than_the_largest_block_repeat_their_scale(
    write_teacher: Callable[..., Path], child: EngineChild, tmp_path: Path, ids: np.ndarray
) -> None:
    wide = load_teacher(str(write_teacher(tmp_path / "model", 3, intermediate_size=512, num_hidden_layers=3)))
    for bits, activation in ((4, "fp32"), (2, "fp32")):
        form = Format(bits, 0, activation)  # type: ignore[arg-type]
        layer = Layer(512, 2, form, form)
        candidate = Candidate((layer,) * 3, form, form)
        weights = wide.weights()
        model = build_model(weights, candidate, wide.config, wide.shape)
        facts = {n.name: {a.name: a.i for a in n.attribute} for n in model.graph.node}
        assert (
            facts["/model/layers.0/mlp/down_proj"]["block_size"]
            == block_for(0, 512, bits)
            == (128 if bits == 2 else 256)
        )
        shipped = in_engine(child, tmp_path, model, ids)
        assert worst(shipped, in_torch(weights, candidate, wide, ids)) <= BAR
        grouped = changed(candidate, lambda f: dataclasses.replace(f, group_size=256))
        assert worst(shipped, in_torch(weights, grouped, wide, ids)) > 10 * BAR


def test_a_dynamic_scale_is_that_of_the_whole_batch(
    tiny_teacher: Teacher, child: EngineChild, tmp_path: Path, ids: np.ndarray
) -> None:
    """Why such models are scored one window at a time."""
    candidate = ROUNDED["dynamic"]
    weights = student_weights(tiny_teacher, candidate)
    model = build_model(weights, candidate, tiny_teacher.config, tiny_teacher.shape)
    alone = in_engine(child, tmp_path, model, ids, one_by_one=True)
    assert worst(alone, in_engine(child, tmp_path, model, ids)) > 10 * BAR


def test_formats_that_need_calibration_cannot_ship_without_it(tiny_teacher: Teacher) -> None:
    for form in (STATIC, CLIP4):
        candidate = uniform(form, FP32, FP32)
        weights = student_weights(tiny_teacher, candidate)
        with pytest.raises(ValueError, match=r"must be given"):
            build_model(weights, candidate, tiny_teacher.config, tiny_teacher.shape)
        with pytest.raises(ValueError, match=r"must be given"):
            in_torch(weights, candidate, tiny_teacher, np.zeros((1, 2), np.int64))


def shipped_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """What each product multiplies by, [N, K] by node name: integers, or 16-bit floats."""
    tensors = {t.name: t for t in model.graph.initializer}
    widened = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in ("Cast", "DequantizeLinear")}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            facts = {a.name: a.i for a in node.attribute}
            data = onnx.numpy_helper.to_array(tensors[node.input[1]])
            parts = [(data >> (facts["bits"] * i)) & (2 ** facts["bits"] - 1) for i in range(8 // facts["bits"])]
            codes = np.stack(parts, -1).reshape(facts["N"], facts["K"]).astype(int)
            found[node.name] = codes - 2 ** (facts["bits"] - 1)
        elif node.op_type == "MatMulInteger":
            found[node.name] = onnx.numpy_helper.to_array(tensors[node.input[1]]).T
        elif node.op_type == "MatMul" and widened.get(node.input[1]) in tensors:
            found[node.name] = np.asarray(onnx.numpy_helper.to_array(tensors[widened[node.input[1]]])).T
    return found


@pytest.mark.parametrize(
    "form",
    [
        *(FP16, BF16, CHANNEL4, CHANNEL8, INT2, CLIP2, CLIP4, DYNAMIC, STATIC),
        Format(4, 0, "fp32", "gptq"),
        Format(8, 0, "static", "gptq"),
    ],
    ids=lambda f: f"{f.label} {f.activation} {f.group_size}",
)
@pytest.mark.parametrize("pattern", [SPARSE, Pattern("block", 0.5)], ids=lambda p: p.kind)
def test_the_zeros_of_a_mask_ship(form: Format, pattern: Pattern, tiny_teacher: Teacher) -> None:
    candidate = uniform(form, FP32, FP32, pattern)
    weights, codes = calibrated(tiny_teacher, candidate)
    shipped = shipped_weights(build_model(weights, candidate, tiny_teacher.config, tiny_teacher.shape, codes))
    assert len(shipped) == 3 * 5  # packed qkv, o, gate, up, down
    for i, (node, name) in itertools.product(
        range(3), (("attn/o_proj", "self_attn.o_proj"), ("mlp/up_proj", "mlp.up_proj"))
    ):
        value = shipped[f"/model/layers.{i}/{node}"].astype(float)
        zeros = (weights[f"model.layers.{i}.{name}.weight"] == 0).numpy()
        assert zeros.mean() == pytest.approx(0.5, abs=0.01)
        assert (value[zeros] == 0).all()
        assert (value[~zeros] != 0).mean() > (0.5 if form.bits == 2 else 0.8), "control: the others are not"


def test_fewer_bits_ship_fewer_bytes(tiny_teacher: Teacher) -> None:
    def size(form: Format) -> int:
        candidate = uniform(form)
        weights, codes = calibrated(tiny_teacher, candidate)
        return len(build_model(weights, candidate, tiny_teacher.config, tiny_teacher.shape, codes).SerializeToString())

    constant = 0.4 * size(FP32)  # rotary tables and node names weigh as much as this model
    assert size(FP16) == size(BF16) < size(FP32)
    tables = sum(w.numel() for w in tiny_teacher.weights().values() if w.ndim == 2)
    assert size(FP32) - size(FP16) == pytest.approx(2 * tables, rel=0.02)
    assert size(INT2) < size(CHANNEL4) < size(Format(4, 32)) < size(CHANNEL8) < size(FP16)
    assert size(INT2) > constant / 10


# candidates and the space


def test_keys_tell_the_new_precisions_apart_and_survive_json() -> None:
    shape = Shape(3, 64, 128, 4, 2, 16, 288)
    found = [c.canonical(shape) for c in (*EXACT.values(), *CALIBRATED.values(), *ROUNDED.values())]
    assert len({c.key for c in found}) == len(found)
    for candidate in found:
        assert Candidate.from_json(candidate.to_json()) == candidate
        assert candidate.canonical(shape) == candidate
        assert candidate.is_quantized
    assert "per channel" in uniform(CHANNEL4).describe() and "groups of 0" not in uniform(CHANNEL4).describe()
    assert "bf16" in uniform(BF16).describe() and "int2 clip" in uniform(CLIP2).describe()
    assert "static int8 activations" in uniform(STATIC).describe()


def test_settings_without_effect_do_not_change_the_key() -> None:
    shape = Shape(3, 64, 128, 4, 2, 16, 288)
    equal = [
        (Format(16, 64, "int8", "gptq"), FP16),
        (Format(8, 64, "dynamic"), DYNAMIC),
        (Format(8, 32, "static", half="bf16"), STATIC),
        (Format(4, 32, half="bf16"), Format(4, 32)),
    ]
    for form, plain in equal:
        assert uniform(form, FP32, FP32).canonical(shape).key == uniform(plain, FP32, FP32).canonical(shape).key
    with pytest.raises(ValueError, match=r"dynamic activations take int8 weights, but got int4"):
        uniform(Format(4, 32, "dynamic")).canonical(shape)
    with pytest.raises(ValueError, match="multiple of 16"):
        uniform(CHANNEL4).canonical(dataclasses.replace(shape, hidden=40))


WIDE = PrecisionChoices(tuple(KERNELS_OF), (32, 64, 0), ("rtn", "clip", "gptq"))
SMALL = [
    (Shape(1, 64, 32, 2, 2, 16, 100), PrecisionChoices(("fp32", "int8", "int8-dynamic", "int8-static"), (32, 0))),
    (Shape(1, 64, 32, 2, 2, 16, 100), PrecisionChoices(("fp32", "bf16", "int2"), (32, 64, 0), ("rtn", "clip"))),
    (
        Shape(1, 64, 32, 2, 2, 16, 100, tied=False),
        PrecisionChoices(("fp32", "int4", "int8-static"), (0,), ("rtn", "clip")),
    ),
]


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Everything a sampler can propose for dense candidates of full size."""
    fixed: dict[str, list[Any]] = {"pattern": ["none"], "ratio": [0], "score": ["magnitude"]}
    ranges = {
        name: fixed.get(name) or (range(bounds[0], bounds[1] + 1) if kind == "int" else bounds)
        for name, (kind, bounds) in space.distributions().items()
    }
    return (dict(zip(ranges, values, strict=True)) for values in itertools.product(*ranges.values()))


@pytest.mark.parametrize(("shape", "choices"), SMALL, ids=lambda v: "-".join(v.names) if hasattr(v, "names") else "")
def test_the_widened_space_counts_encodes_and_has_kernels(shape: Shape, choices: PrecisionChoices) -> None:
    space = Space(shape, tuple(ONNXRUNTIME_CPU), 1, 32, 2, choices=choices)
    found = {c.key: c for c in map(space.decode, combinations(space))}
    patterns = 1 + len(space.scores) + (len(PATTERNS) - 2) * len(space.scores) * len(RATIOS)
    assert space.size() == patterns * len(found)
    for candidate in found.values():
        assert space.decode(space.encode(candidate)) == candidate
        layer = candidate.layers[0]
        for form in (layer.attention_format, layer.ffn_format, candidate.head_format):
            assert form.kernel in choices.of(space.kernels)
    assert [b.head_format.name for b in space.baselines()] == [n for n in ("fp32", "int8", "int4") if n in space.levels]


def test_everything_together_has_every_level_coarse_to_fine() -> None:
    space = Space.of(Shape(6, 256, 768, 8, 4, 32, 4096), tuple(ONNXRUNTIME_CPU), choices=WIDE)
    assert space.levels == ("int2", "int4", "int8", "bf16", "fp16", "fp32")
    assert space.bits == (2, 4, 8, 16, 16, 32)
    assert space.group_sizes == (32, 64, 0)
    ranges = space.distributions()
    assert ranges["int8_activation"] == ("categorical", ("int8", "dynamic", "static"))
    assert ranges["quantizer"] == ("categorical", ("rtn", "clip", "gptq"))
    for candidate in space.baselines():
        assert space.decode(space.encode(candidate)) == candidate
        assert {candidate.head_format.group_size} <= {0, 32} and candidate.quantizer == "rtn"


def test_the_default_space_is_the_one_without_the_new_precisions() -> None:
    shape = Shape(6, 256, 768, 8, 4, 32, 4096)
    now, before = (Space.of(shape, kernels) for kernels in (tuple(ONNXRUNTIME_CPU), OLD_KERNELS))
    assert now.distributions() == before.distributions()
    assert now.size() == before.size()
    assert [c.key for c in now.baselines()] == [c.key for c in before.baselines()]


def test_a_spec_widens_and_narrows_the_precisions(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("precisions: [fp32, bf16, int4]\ngroup_sizes: [64, channel]\nquantizers: [rtn, clip]\n")
    choices = make_spec(file, None, {}).choices
    assert choices == PrecisionChoices(("fp32", "bf16", "int4"), (64, 0), ("rtn", "clip"))
    assert choices.missing(OLD_KERNELS) == ("bf16",) and choices.missing(tuple(ONNXRUNTIME_CPU)) == ()
    assert make_spec(None, None, {}).choices == PrecisionChoices()
    assert PrecisionChoices().missing(("fp32/fp32",)) == (), "a small profile narrows the default without complaint"
    for text, problem in (
        ("precisions: [int4]", "fp32 must be among"),
        ("quantizers: [gptq]", "rtn must be among"),
        ("group_sizes: []", "at least one"),
        ("precisions: [fp32, int3]", "int3"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError) as caught:
            make_spec(file, None, {})
        assert problem in str(caught.value)


def test_a_precision_without_kernel_is_refused_before_any_work(
    tiny_teacher_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    from paretune.common.yaml_file import dump_model
    from paretune.hardware_profiles.profile import detected_profile
    from paretune.search.prepare.prepare import prepare

    profile = detected_profile().model_copy(update={"weight_formats": OLD_KERNELS, "name": "old"})
    (tmp_path / "old.yaml").write_text(dump_model(profile, "kept from an earlier version"))
    options = {"teacher": str(tiny_teacher_dir), "data": str(tiny_text), "profile": str(tmp_path / "old.yaml")}
    with pytest.raises(UsageError, match=r"old has no kernel for int2.*precisions"):
        prepare(make_spec(None, None, {**options, "precisions": ("fp32", "int2")}), tmp_path / "home")
