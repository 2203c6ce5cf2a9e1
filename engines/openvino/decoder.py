"""One ONNX decoder in OpenVINO on the CPU: the same file that ONNX Runtime runs.

OpenVINO takes liberties by default that would make its numbers another model's: bfloat16 arithmetic where the CPU has it,
8-bit activations in front of compressed weights, an 8-bit KV cache. All three are switched off here, and so are integer products
where the CPU clips them, so logits agree with ONNX Runtime wherever activations are floats. `accuracy_level` of
MatMulNBits is not read: activations that ONNX Runtime rounds to 8 bits stay floats here. The KV cache becomes state inside the
engine, as its own text generation has it. Imported in engine children only.
"""

from __future__ import annotations

import platform
import time
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino._offline_transformations import apply_make_stateful_transformation
from openvino.frontend.onnx import ConversionExtension

from paretune.common.errors import EnvironmentProblem
from paretune.engines.decoder import CPU, EngineDecoder, Ids, Logits
from paretune.hardware_profiles.detect import detect_local

PAST, PRESENT = "past_key_values.", "present."
MASK = "attention_mask"
UNWRITTEN = np.float32(-3e38)  # no logit


def open_model(path: str, threads: int, provider: str = CPU) -> Decoder:
    """Open a decoder's graph on the CPU.

    Raises EnvironmentProblem for any other provider, ValueError for a module of a plug-in.
    """
    if provider != CPU:
        raise EnvironmentProblem(
            f"the engine openvino is run on the CPU only, but the profile asks for {provider}",
            f"set execution_provider: {CPU}, or engine: onnxruntime",
        )
    return Decoder(path, threads)


class Decoder(EngineDecoder):
    """A decoder compiled for the CPU. Raises ValueError for a graph without the input `input_ids`."""

    def __init__(self, path: str, threads: int) -> None:
        core = ov.Core()
        core.add_extension(ConversionExtension("GatherBlockQuantized", "com.microsoft", _gather_quantized))
        model = core.read_model(path)
        names = [port.get_any_name() for port in model.inputs]
        if "input_ids" not in names:
            raise ValueError(f"a decoder has the input input_ids, but this graph has {', '.join(names)}")
        self.vocab = int(model.output("logits").get_partial_shape()[2].get_length())
        _one_length_for_all(model)
        _keep_the_cache_inside(model, [name for name in names if name.startswith(PAST)])
        self.compiled = core.compile_model(model, "CPU", settings(threads))
        self.request = self.compiled.create_infer_request()

    def logits(self, ids: Ids) -> Logits:
        """Return the logits [batch, length, vocab] of `ids` [batch, length]. It empties the KV cache first."""
        run = self.begin(*ids.shape)
        run.step(ids)
        return run.logits()

    def begin(self, batch: int, length: int) -> Stateful:
        """Empty the KV cache and return a generation for `batch` rows of up to `length` tokens."""
        self.request.reset_state()
        return Stateful(self.request, np.ones((batch, length), np.int64))


class Stateful:
    """A generation; a decoder has one at a time, because its request holds the KV cache."""

    def __init__(self, request: Any, mask: Ids) -> None:
        self.request, self.mask, self.done = request, mask, 0

    def step(self, ids: Ids) -> float:
        """Run `ids` [batch, length] after everything run before; return the milliseconds that the engine took.

        Raises RuntimeError if OpenVINO returns without an answer.
        """
        self.done += ids.shape[1]
        self.request.set_tensor("input_ids", ov.Tensor(np.ascontiguousarray(ids)))
        self.request.set_tensor(MASK, ov.Tensor(np.ascontiguousarray(self.mask[:, : self.done])))
        self._mark()
        start = time.perf_counter()
        self.request.infer(share_outputs=True)
        elapsed = (time.perf_counter() - start) * 1e3
        self._require_an_answer(ids.shape)
        return elapsed

    def logits(self) -> Logits:
        """Return a copy of the logits [batch, length, vocab] of the last step."""
        return np.array(self.request.get_tensor("logits").data, np.float32)

    def _mark(self) -> None:
        last = self.request.get_tensor("logits").data
        if last.size:
            last.flat[-1] = UNWRITTEN

    def _require_an_answer(self, shape: tuple[int, ...]) -> None:
        """`infer` of OpenVINO 2026.4 returns as if all were well when it could not allocate: its outputs are those of before.
        The same request through `wait` then says why."""
        found = self.request.get_tensor("logits").data
        if found.shape[:2] == shape and found.flat[-1] != UNWRITTEN:
            return
        self.request.start_async()
        self.request.wait()
        raise RuntimeError("OpenVINO returned without an answer and without a reason")


def settings(threads: int) -> dict[str, Any]:
    """The engine computes what the graph says: float32, whatever the CPU offers."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # the parent has pinned the process
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        **({} if _exact_in_8_bits(platform.machine(), detect_local().isa) else {"LP_TRANSFORMS_MODE": False}),
    }


def _exact_in_8_bits(machine: str, isa: tuple[str, ...]) -> bool:
    """x86 CPUs without VNNI add pairs of 8-bit products in 16 bits and clip the sum, so there the products are left to floats."""
    return machine not in ("x86_64", "AMD64") or bool({"avx512_vnni", "avx_vnni"} & set(isa))


def _one_length_for_all(model: Any) -> None:
    """Take the number of valid keys from the first row of the mask alone.

    OpenVINO's GroupQueryAttention wants one length, not one per row, and fails on more; all rows of ours are equally long.
    """
    first = np.array([0], np.int64)
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReduceSum" and node.input_value(0).get_node().get_friendly_name() == MASK:
            row = ops.gather(node.input_value(0), ops.constant(first), ops.constant(np.int64(0)))
            node.input(0).replace_source_output(row.output(0))
    model.validate_nodes_and_infer_types()


def _keep_the_cache_inside(model: Any, pasts: list[str]) -> None:
    """Make every pair of past and present a variable that starts empty, with as many rows as `input_ids` has."""
    apply_make_stateful_transformation(model, {name: name.replace(PAST, PRESENT) for name in pasts})
    ids = model.input("input_ids").get_node()
    batch = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant(np.array([0])), ops.constant(np.int64(0)))
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ReadValue":
            heads, size = (int(node.get_output_partial_shape(0)[i].get_length()) for i in (1, 3))
            rest = ops.constant(np.array([heads, 0, size], np.int64))
            zeros = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, rest], 0))
            node.set_arguments([zeros])
    model.validate_nodes_and_infer_types()


def _gather_quantized(node: Any) -> list[Any]:
    """GatherBlockQuantized whose table is a Reshape, as where the head shares it; OpenVINO's own takes constants only.

    Rows of codes are gathered as bytes and unpacked by float arithmetic, which is exact for them.
    """
    codes, ids, scales = (node.get_input(i) for i in range(3))
    bits, zero = int(node.get_attribute("bits")), ops.constant(np.int64(0))
    rest = ops.convert(ops.gather(codes, ids, zero), "f32")
    parts = []
    for place in reversed(range(8 // bits)):
        unit = ops.constant(np.float32(2 ** (bits * place)))
        part = ops.floor(ops.divide(rest, unit))
        rest = ops.subtract(rest, ops.multiply(part, unit))
        parts.append(ops.unsqueeze(part, ops.constant(np.int64(-1))))
    centred = ops.subtract(ops.concat(parts[::-1], -1), ops.constant(np.float32(2 ** (bits - 1))))
    factors = ops.gather(scales, ids, zero)
    size = ops.constant(np.array([0, 0, -1, int(node.get_attribute("block_size"))]))
    blocks = ops.multiply(ops.reshape(centred, size, True), ops.unsqueeze(factors, ops.constant(np.int64(-1))))
    return list(ops.reshape(blocks, ops.constant(np.array([0, 0, -1])), True).outputs())
