"""The grid against a slow loop and against ONNX Runtime's own kernels, matrix by matrix."""

from __future__ import annotations

import struct

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from paretune.compression.export.graph_builder import GraphBuilder, pack
from paretune.compression.prune import mask_for
from paretune.compression.quantize import Quantized, fake_quantize, fake_quantize_activations, quantize
from paretune.spaces import Format, Pattern
from paretune.spaces.candidate import Activation, Bits, group_for

BITS = (4, 8)
matrices = (
    st.tuples(st.integers(1, 4), st.integers(1, 6))
    .flatmap(
        lambda size: hnp.arrays(
            np.float32,
            (size[0], 16 * size[1]),
            elements=st.one_of(
                st.just(0.0),
                st.floats(-100, 100, width=32).map(lambda v: float(np.float32(v)) if abs(v) > 1e-3 else 0.0),
            ),
        )
    )
    .map(torch.from_numpy)
)


def random_matrix(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def single(value: float) -> float:
    """Round to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def slow_quantize(weight: torch.Tensor, bits: int, group: int) -> tuple[list[list[int]], list[list[float]]]:
    """Plain Python: per group, the entry of largest magnitude becomes -2^(bits-1)."""
    codes, scales = [], []
    for row in weight.tolist():
        row_codes, row_scales = [], []
        for start in range(0, len(row), group):
            values = row[start : start + group]
            extreme = max(values, key=lambda v: (abs(v), -v))  # the negative one of two equal magnitudes
            scale = single(extreme / -(2 ** (bits - 1))) or 2.0**-20
            row_scales.append(scale)
            row_codes += [min(2 ** (bits - 1) - 1, max(-(2 ** (bits - 1)), round(single(v / scale)))) for v in values]
        codes.append(row_codes)
        scales.append(row_scales)
    return codes, scales


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_codes_and_scales_are_those_of_the_slow_loop(bits: int, group: int) -> None:
    weight = random_matrix(7, 192)
    weight[2] = 0
    found = quantize(weight, Format(bits, group))  # type: ignore[arg-type]
    codes, scales = slow_quantize(weight, bits, group)
    assert found.codes.tolist() == codes
    assert found.scales.tolist() == scales
    assert found.codes.dtype == torch.int8
    dequantized = [[single(c * scales[i][j // group]) for j, c in enumerate(row)] for i, row in enumerate(codes)]
    assert found.dequantize().tolist() == dequantized


@given(matrices, st.sampled_from(BITS), st.sampled_from([16, 32, 64]))
def test_random_matrices_agree_with_the_slow_loop(weight: torch.Tensor, bits: int, group: int) -> None:
    found = quantize(weight, Format(bits, group))  # type: ignore[arg-type]
    codes, scales = slow_quantize(weight, bits, found.group_size)
    assert found.scales.tolist() == scales
    assert (found.codes - torch.tensor(codes)).abs().max() == 0


@given(matrices, st.sampled_from(BITS), st.sampled_from([16, 32, 64, 128]))
def test_codes_lie_in_range_zeros_stay_and_the_error_is_bounded(weight: torch.Tensor, bits: int, group: int) -> None:
    """At most half a step, or one step where a value opposite to the extreme one does not fit the asymmetric range."""
    found = quantize(weight, Format(bits, group))  # type: ignore[arg-type]
    top = 2 ** (bits - 1)
    assert found.group_size == group_for(group, weight.shape[1])
    assert -top <= int(found.codes.min()) <= int(found.codes.max()) <= top - 1
    rounded = found.dequantize()
    assert (rounded[weight == 0] == 0).all()
    step = found.scales.abs().repeat_interleave(found.group_size, 1)
    error = (rounded - weight).abs()
    clipped = (weight / found.scales.repeat_interleave(found.group_size, 1)) > top - 0.5
    assert (error <= torch.where(clipped, step, step / 2) * (1 + 1e-5)).all()
    blocks = weight.view(len(weight), -1, found.group_size)
    at = blocks.abs().argmax(-1, keepdim=True)
    exact = rounded.view_as(blocks).gather(-1, at)
    assert torch.allclose(exact.abs(), blocks.gather(-1, at).abs(), rtol=2 / top if bits == 4 else 2e-2)


@pytest.mark.parametrize("bits", BITS)
def test_the_extreme_entry_of_a_group_is_exact_and_uses_the_whole_range(bits: int) -> None:
    weight = random_matrix(16, 256)
    found = quantize(weight, Format(bits, 64))  # type: ignore[arg-type]
    assert (found.codes.view(16, 4, 64).amin(-1) == -(2 ** (bits - 1))).all()
    blocks, rounded = weight.view(16, 4, 64), found.dequantize().view(16, 4, 64)
    at = blocks.abs().argmax(-1, keepdim=True)
    assert torch.allclose(rounded.gather(-1, at), blocks.gather(-1, at), rtol=1e-6)


@given(matrices, st.sampled_from(BITS))
def test_rounding_twice_changes_nothing(weight: torch.Tensor, bits: int) -> None:
    form = Format(bits, 32)  # type: ignore[arg-type]
    once = fake_quantize(weight, form)
    assert torch.allclose(fake_quantize(once, form), once, rtol=1e-6, atol=0)


def test_one_bit_coarser_is_a_larger_error() -> None:
    weight = random_matrix(64, 256)
    errors = [
        float((fake_quantize(weight, form) - weight).norm()) for form in (Format(8, 32), Format(4, 32), Format(4, 128))
    ]
    assert errors[0] < errors[1] / 8
    assert errors[1] < errors[2]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "pattern", [Pattern("2:4", 0.5), Pattern("unstructured", 0.7), Pattern("block", 0.5)], ids=lambda p: p.kind
)
def test_a_mask_survives_quantization(bits: int, pattern: Pattern) -> None:
    weight = random_matrix(32, 128)
    mask = mask_for(weight, pattern, None)
    found = quantize(weight * mask, Format(bits, 32))  # type: ignore[arg-type]
    assert (found.codes[~mask] == 0).all()
    assert (found.dequantize()[~mask] == 0).all()


def test_slices_quantize_like_their_copies() -> None:
    whole = random_matrix(32, 256)
    for view in (whole[:, :128], whole[:16, :64], whole.t()[:, :32]):
        for bits in BITS:
            form = Format(bits, 32)  # type: ignore[arg-type]
            assert torch.equal(
                fake_quantize(view, form), fake_quantize(view.clone(memory_format=torch.contiguous_format), form)
            )


@pytest.mark.parametrize("form", [Format(4, 32), Format(8, 64), Format()], ids=lambda f: f.name)
def test_gradients_pass_straight_through(form: Format) -> None:
    weight = random_matrix(8, 64).requires_grad_()
    upstream = random_matrix(8, 64, 1)
    rounded = fake_quantize(weight, form)
    assert torch.equal(rounded.detach(), fake_quantize(weight.detach(), form)) or torch.allclose(
        rounded.detach(), fake_quantize(weight.detach(), form), atol=1e-8
    )
    rounded.backward(upstream)
    assert weight.grad is not None and torch.equal(weight.grad, upstream)
    x = random_matrix(8, 64, 2).requires_grad_()
    fake_quantize_activations(x, 32).backward(upstream)
    assert x.grad is not None and torch.equal(x.grad, upstream)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_activations_are_rounded_like_the_slow_loop(group: int) -> None:
    x = random_matrix(6, 64) * 20
    x[1, :32] = 0
    expected = []
    for row in x.tolist():
        out: list[float] = []
        for start in range(0, 64, group):
            values = row[start : start + group]
            scale = single(max(abs(v) for v in values) / 127)
            out += [single(round(single(v / scale)) * scale) if scale else 0.0 for v in values]
        expected.append(out)
    assert torch.allclose(fake_quantize_activations(x, group), torch.tensor(expected), rtol=1e-6, atol=0)
    assert fake_quantize_activations(x, 0) is x
    assert fake_quantize_activations(x.bfloat16(), group).dtype == torch.bfloat16
    cube = x.view(2, 3, 64)
    assert torch.equal(fake_quantize_activations(cube, group), fake_quantize_activations(x, group).view(2, 3, 64))


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_the_layout_of_the_operator(bits: int) -> None:
    """Slow oracle of the MatMulNBits layout: codes plus 2^(bits-1), group by group, the even column in the low nibble."""
    found = quantize(random_matrix(3, 96), Format(bits, 32))  # type: ignore[arg-type]
    packed = pack(found)
    assert packed.shape == (3, 3, 32 * bits // 8)
    for row in range(3):
        for column in range(96):
            group, inside = divmod(column, 32)
            byte = int(packed[row, group, inside * bits // 8])
            code = byte if bits == 8 else (byte >> (4 * (inside % 2))) & 15
            assert code - 2 ** (bits - 1) == int(found.codes[row, column])


def engine(x: torch.Tensor, weight: torch.Tensor, form: Format) -> torch.Tensor:
    """x @ weight.T by ONNX Runtime with the project's own node."""
    graph = GraphBuilder(1e-6)
    graph.matmul(weight, form, "mm", "x")
    graph.nodes[-1].output[0] = "y"
    made = helper.make_graph(
        graph.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", weight.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", weight.shape[0]])],
        list(graph.initializers.values()),
    )
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def faked(x: torch.Tensor, weight: torch.Tensor, form: Format) -> torch.Tensor:
    inputs = fake_quantize_activations(x, group_for(form.group_size, x.shape[1])) if form.activation == "int8" else x
    return inputs @ fake_quantize(weight, form).T


@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize(("bits", "activation"), [(4, "fp32"), (4, "int8"), (8, "int8"), (8, "fp32")])
def test_the_engine_computes_what_fake_quantization_says(
    bits: Bits, activation: Activation, group: int, rows: int
) -> None:
    """Bar: a tenth of the effect of what is guarded, and 1e-5 of the output's size. The controls are the effects.

    The engine multiplies by a reciprocal, so about one activation in a million that lies on a tie rounds the other way: one
    row may be off by one step of one activation (measured over 12 M activations; the seeds are fixed, so nothing here is luck).
    """
    generator = torch.Generator().manual_seed(bits * 1000 + group + rows)
    x = torch.randn(rows, 256, generator=generator) * torch.rand(rows, 1, generator=generator) * 3
    weight = torch.randn(128, 256, generator=generator) * 0.05
    form = Format(bits, group, activation)
    actual = engine(x, weight, form)
    difference, bar = (actual - faked(x, weight, form)).abs(), 1e-5 * float(actual.abs().max())
    beyond = (difference > bar).any(1)
    if activation == "int8":
        assert int(beyond.sum()) <= 1
        assert float(difference.max()) <= 1.02 * float(x.abs().max()) / 127 * float(weight.abs().max())
    else:
        assert not beyond.any()
    controls = {
        "fake-quant off": x @ weight.T,
        "other weight grid": faked(x, weight, Format(bits, 32 if group != 32 else 64, form.activation)),
        "other activations": faked(x, weight, Format(bits, group, "int8" if activation == "fp32" else "fp32")),
    }
    if bits == 8:
        controls["one bit coarser"] = faked(x, coarser(weight, group, 7), Format(32, 0))
    else:
        controls["one bit coarser"] = faked(x, coarser(weight, group, 3), Format(32, 0))
    for name, other in controls.items():
        assert float((actual - other).abs().amax(1).median()) > 10 * bar, name


def test_groups_of_zeros_come_out_as_zeros_of_the_int8_kernel() -> None:
    x, weight = random_matrix(16, 256) * 60, random_matrix(64, 256, 1)
    weight[5], weight[9, :64] = 0, 0
    form = Format(8, 32, "int8")
    actual = engine(x, weight, form)
    assert float(actual[:, 5].abs().max()) < 1e-6
    assert float((actual - faked(x, weight, form)).abs().max()) <= 1e-5 * float(actual.abs().max())


def coarser(weight: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    codes, scales = slow_quantize(weight[:2], bits, group)
    rounded = weight.clone()
    rounded[:2] = Quantized(torch.tensor(codes, dtype=torch.int8), torch.tensor(scales), bits, group).dequantize()
    rounded[2:] = fake_quantize(weight[2:], Format(4 if bits == 3 else 8, group))
    return rounded
