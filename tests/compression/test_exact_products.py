"""Products of 8 bits are exact on every CPU: x86 without VNNI adds pairs of them in 16 bits, and clips, unless told not to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

from paretune.compression.export.artifact import write_artifact
from paretune.compression.export.graph_builder import GraphBuilder
from paretune.engines.onnxruntime.decoder import Decoder, open_session
from paretune.spaces import Candidate, Format, Layer
from paretune.spaces.candidate import FP32
from paretune.teachers.checkpoint.teacher import Teacher

DYNAMIC, WIDTH = Format(8, 0, "dynamic"), 64


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_the_largest_codes_are_added_up(tmp_path: Path, rows: int) -> None:
    """255 x 127 twice is more than 16 bits hold. Two products, as ONNX Runtime fails where two share a zero point."""
    graph = GraphBuilder(1e-6)
    for i, x in enumerate(("x", graph.node("Identity", ["x"], "same"))):
        graph.matmul(torch.ones(WIDTH, WIDTH), DYNAMIC, f"product{i}", x)
        graph.nodes[-1].output[0] = f"y{i}"
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, WIDTH]) for name in ("x", "y0", "y1")]
    made = helper.make_graph(graph.nodes, "g", ports[:1], ports[1:], list(graph.initializers.values()))
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    found = open_session(str(tmp_path / "m.onnx"), 1).run(None, {"x": np.ones((rows, WIDTH), np.float32)})
    for y in found:
        np.testing.assert_allclose(y, WIDTH, rtol=1e-5)


def test_text_is_generated_with_exact_products(tiny_teacher: Teacher, tmp_path: Path) -> None:
    """onnxruntime-genai's first logits from an artifact are the engine's. Alone: a dynamic scale is that of the whole prompt."""
    import onnxruntime_genai as genai

    candidate = Candidate((Layer(128, 2, DYNAMIC, DYNAMIC),) * 3, DYNAMIC, FP32)
    write_artifact(tmp_path / "artifact", tiny_teacher, candidate, tiny_teacher.weights(), {})
    prompt = [17, 5, 200, 33, 90]
    expected = Decoder(str(tmp_path / "artifact" / "onnx" / "model.onnx"), 1).logits(np.array([prompt]))[0, -1]
    model = genai.Model(str(tmp_path / "artifact" / "onnx"))
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens(prompt)
    np.testing.assert_allclose(np.asarray(generator.get_logits()).reshape(-1, 288)[-1], expected, atol=1e-4)


def test_openvino_multiplies_in_integers_only_where_they_are_exact() -> None:
    pytest.importorskip("openvino")
    from paretune.engines.openvino.decoder import _exact_in_8_bits

    assert _exact_in_8_bits("x86_64", ("avx2", "avx_vnni"))
    assert _exact_in_8_bits("x86_64", ("avx512f", "avx512_vnni", "amx_int8"))
    assert _exact_in_8_bits("aarch64", ())
    assert not _exact_in_8_bits("x86_64", ("avx2", "avx512f"))
