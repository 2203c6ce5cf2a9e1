"""An engine that refuses a graph is quoted with the op and the layer, and the search goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from paretune.common.errors import Infeasible
from paretune.compression.export import artifact
from paretune.compression.export.graph import build_model, save_model
from paretune.engines.diagnosis import place_of
from paretune.engines.process.child import EngineChild
from paretune.spaces import Candidate, Format, Layer
from paretune.teachers.checkpoint.teacher import Teacher

INT4 = Format(4, 32, "fp32")
PLAIN = Candidate((Layer(128, 2),) * 3)
QUANTIZED = Candidate((Layer(128, 2, INT4, INT4),) * 3, INT4, INT4)
Spoil = Callable[[onnx.ModelProto], None]


def unknown_op(model: onnx.ModelProto) -> None:
    """An operator that no engine has."""
    node_at(model, "/model/layers.1/mlp/up_proj").op_type = "MatMulOfTomorrow"


def bf16_matmul(model: onnx.ModelProto) -> None:
    """ONNX Runtime's CPU has no kernel for a product in bfloat16."""
    node = node_at(model, "/model/layers.2/attn/o_proj")
    stream, weight, output = node.input[0], node.input[1], node.output[0]
    casts = [
        helper.make_node("Cast", [stream], ["narrow"], "narrow", to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [weight], ["narrow.weight"], "narrow.weight", to=TensorProto.BFLOAT16),
    ]
    node.input[0], node.input[1], node.output[0] = "narrow", "narrow.weight", "narrow.product"
    wide = helper.make_node("Cast", ["narrow.product"], [output], "wide", to=TensorProto.FLOAT)
    place = next(i for i, n in enumerate(model.graph.node) if n.name == node.name)
    nodes = list(model.graph.node)
    nodes[place : place + 1] = [*casts, nodes[place], wide]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def wrong_bits(model: onnx.ModelProto) -> None:
    """MatMulNBits has no codes of 3 bits."""
    attribute(node_at(model, "/model/layers.0/mlp/down_proj"), "bits").i = 3


def wrong_size(model: onnx.ModelProto) -> None:
    """An inner width that does not fit; found when the graph runs, or before."""
    for tensor in model.graph.initializer:
        if tensor.name == "/model/layers.1/mlp/gate_proj.weight":
            values = np.frombuffer(tensor.raw_data, np.float32).reshape(tuple(tensor.dims))
            tensor.dims[:] = [values.shape[0] - 32, values.shape[1]]
            tensor.raw_data = values[:-32].tobytes()


def node_at(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


CASES: list[tuple[Candidate, Spoil, str]] = [
    (PLAIN, unknown_op, "MatMulOfTomorrow of layer 1 (/model/layers.1/mlp/up_proj)"),
    (PLAIN, bf16_matmul, "MatMul of layer 2 (/model/layers.2/attn/o_proj)"),
    (QUANTIZED, wrong_bits, "MatMulNBits: "),  # an error in the making of a kernel does not say which
    (PLAIN, wrong_size, "MatMul of layer 1 (/model/layers.1/mlp/gate_proj)"),
]


@pytest.mark.parametrize(("candidate", "spoil", "place"), CASES)
def test_what_the_engine_refuses_is_named_by_op_and_layer(
    candidate: Candidate, spoil: Spoil, place: str, tiny_teacher: Teacher, tiny_weights: Any, tmp_path: Path
) -> None:
    model = build_model(tiny_weights, candidate, tiny_teacher.config, tiny_teacher.shape)
    save_model(model, tmp_path / "whole.onnx")
    spoil(model)
    save_model(model, tmp_path / "spoilt.onnx")
    with EngineChild(1) as child:
        child.ask(do="load", path=str(tmp_path / "whole.onnx"), threads=1)
        with pytest.raises(Infeasible) as caught:
            child.ask(do="load", path=str(tmp_path / "spoilt.onnx"), threads=1)
            child.ask(do="time", prompt=8, tokens=2)
        assert f", at {place}" in caught.value.problem
        child.ask(do="load", path=str(tmp_path / "whole.onnx"), threads=1)
        assert child.ask(do="time", prompt=8, tokens=2)["step_ms"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("the engine died: exit status -9", ""),
        (
            "Could not find an implementation for MatMul(13) node with name '/model/layers.12/attn/o_proj'",
            "MatMul of layer 12 (/model/layers.12/attn/o_proj)",
        ),
        (
            "Non-zero status code returned while running Gather node. Name:'/model/embed_tokens' Status Message: idx",
            "Gather outside the layers (/model/embed_tokens)",
        ),
        ("Fatal error: com.foo:Bar(-1) is not a registered function/op", "Bar"),
    ],
)
def test_places_in_messages(text: str, place: str) -> None:
    assert place_of(text, None) == place


def test_a_graph_that_cannot_be_built_is_named_by_op_and_layer(
    tiny_teacher: Teacher, tiny_weights: dict[str, Any], tmp_path: Path
) -> None:
    broken = {name: value for name, value in tiny_weights.items() if name != "model.layers.2.mlp.up_proj.weight"}
    for action in (
        lambda: artifact.write_artifact(tmp_path / "a", tiny_teacher, QUANTIZED, broken, {}),
        lambda: artifact.compressed_bytes(broken, QUANTIZED, tiny_teacher.config, tiny_teacher.shape),
    ):
        with pytest.raises(Infeasible, match=r"MatMulNBits at /model/layers.2/mlp/up_proj"):
            action()
    assert not list(tmp_path.iterdir())
