"""The ONNX graph of any module: exported once per structure by torch, then filled with weights and codes.

torch.onnx.export (dynamo) writes the float graph; it is never given a quantized module, because quantized tensors of torchao
come out as float without a word. A quantized weight becomes integer codes and a DequantizeLinear of opset 21 (blocks along K for
Linear weights of few bits, else one scale per output channel) under the weight's old name, so nothing else of the graph changes.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from paretune.common.errors import Infeasible
from paretune.compression.calibration.modules import Matrix, matrices_of, quantize_matrix
from paretune.compression.export.graph_builder import IR_VERSION, OPSET
from paretune.compression.quantize.grid import Quantized
from paretune.spaces.candidate import Format
from paretune.teachers.plugins.plugin import Batch, Forwarding, TeacherPlugin

KIND = "paretune.module"  # as engines/onnxruntime/module.py looks for it
INTEGER = {4: TensorProto.INT4, 8: TensorProto.INT8}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Place:
    """Where a parameter sits in the graph: the initializer's name, and whether it is stored transposed."""

    name: str
    transposed: bool = False


class ModuleGraph:
    """The graph of one structure with its parameters' places; `fill` makes models of it.

    Raises Infeasible with the exporter's words and the parameter, if the module cannot be exported or a parameter got lost.
    """

    def __init__(self, plugin: TeacherPlugin, module: nn.Module, batch: Batch) -> None:
        self.matrices = matrices_of(module)
        self.model = _export(plugin, module, batch)
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        _fold_transposes(self.model)
        self.places = _places(self.model, parameters, self.matrices)

    def fill(self, weights: Mapping[str, torch.Tensor], forms: Mapping[str, Format]) -> onnx.ModelProto:
        """The model with `weights` (all parameters by name, masked, unquantized); matrices of `forms` rounded to nearest."""
        model = copy.deepcopy(self.model)
        made: dict[str, list[onnx.TensorProto]] = {}
        nodes = []
        for name, value in weights.items():
            place = self.places.get(name)
            if place is None:
                continue  # a parameter that the forward pass does not use
            if name in forms:
                tensors, node = _dequantized(place, self.matrices[name], value, forms[name])
                made[place.name] = tensors
                nodes.append(node)
            else:
                stored = value.detach().t() if place.transposed else value.detach()
                made[place.name] = [numpy_helper.from_array(stored.contiguous().numpy(), place.name)]
        old = list(model.graph.initializer)
        del model.graph.initializer[:]
        model.graph.initializer.extend(t for initializer in old for t in made.get(initializer.name, [initializer]))
        rest = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *rest])
        return model


def input_names(batch: Batch) -> list[str]:
    """Return the names of the graph's inputs for this batch: `input0`, `input1`, and so on."""
    return [f"input{i}" for i in range(len(batch.inputs))]


def _export(plugin: TeacherPlugin, module: nn.Module, batch: Batch) -> onnx.ModelProto:
    forwarding = Forwarding(plugin, module).eval()
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            count = len(forwarding(*batch.inputs))
            program = torch.onnx.export(
                forwarding,
                batch.inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=input_names(batch),
                output_names=[f"output{i}" for i in range(count)],
                optimize=False,  # folding would change weights whose codes are to be shipped
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever its passes raise
        raise Infeasible(f"torch cannot export {plugin.name} to ONNX: {_root_cause(error)}", "") from error
    assert program is not None
    model = program.model_proto
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.producer_name = "paretune"
    del model.metadata_props[:]
    helper.set_model_props(model, {KIND: plugin.name})
    for node in model.graph.node:  # stack traces of the exporter, with paths of this machine
        node.doc_string = ""
        del node.metadata_props[:]
    return model


def _root_cause(error: BaseException) -> str:
    """The first line of the innermost error: the op that has no translation, the branch that depends on data."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _fold_transposes(model: onnx.ModelProto) -> None:
    """Store a weight that is only read through a Transpose the way it is read, as the engine's fused kernels want it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {o.name for o in model.graph.output}
    for tensor in list(model.graph.initializer):
        found = readers.get(tensor.name, [])
        if len(found) != 1 or found[0].op_type != "Transpose" or len(tensor.dims) != 2 or found[0].output[0] in outputs:
            continue
        value = np.ascontiguousarray(numpy_helper.to_array(tensor).T)
        replaced = found[0].output[0]
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        model.graph.node.remove(found[0])
        for reader in readers.get(replaced, []):
            for i, name in enumerate(reader.input):
                if name == replaced:
                    reader.input[i] = tensor.name


def _places(
    model: onnx.ModelProto, parameters: Mapping[str, torch.Tensor], matrices: Mapping[str, Matrix]
) -> dict[str, Place]:
    """Find every parameter by its name and check it by its values. A matrix that is not there raises Infeasible."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    used = {name for node in model.graph.node for name in node.input}
    found = {}
    for name, parameter in parameters.items():
        own = parameter.numpy()
        for candidate in (f"module.{name}", name):
            value = values.get(candidate)
            if value is None or candidate not in used:
                continue
            if np.array_equal(value, own):
                found[name] = Place(candidate)
            elif own.ndim == 2 and np.array_equal(value, own.T):
                found[name] = Place(candidate, True)
        if name in matrices and name not in found and not _is_unused(name, values):
            raise Infeasible(
                f"the exported graph must hold the weight {name} as it is, but it does not: something was folded into it",
                "",
            )
    return found


def _is_unused(name: str, values: Mapping[str, Array]) -> bool:
    """Whether the exporter left a parameter out, because the forward pass does not read it."""
    return f"module.{name}" not in values and name not in values


def _dequantized(
    place: Place, matrix: Matrix, weight: torch.Tensor, form: Format
) -> tuple[list[onnx.TensorProto], onnx.NodeProto]:
    """Codes, scales and the DequantizeLinear that gives the weight its old name.

    8-bit codes per channel get zero points of 0: where ONNX Runtime makes 8-bit weights unsigned, on x86 CPUs without VNNI, it
    adds a single one otherwise and refuses it.
    """
    q = quantize_matrix(weight, matrix, form)
    codes, scales, axis = _laid_out(q, matrix, weight, place.transposed)
    attributes: dict[str, Any] = {"axis": axis}
    if scales.ndim == 2:
        attributes["block_size"] = q.group_size
    inputs = [f"{place.name}.codes", f"{place.name}.scales"]
    tensors = [
        _integers(codes, form.bits, f"{place.name}.codes"),
        numpy_helper.from_array(scales, f"{place.name}.scales"),
    ]
    if form.bits == 8 and scales.ndim == 1:
        inputs.append(f"{place.name}.zeros")
        tensors.append(numpy_helper.from_array(np.zeros(scales.shape, np.int8), f"{place.name}.zeros"))
    node = helper.make_node("DequantizeLinear", inputs, [place.name], f"{place.name}/dequantize", **attributes)
    return tensors, node


def _laid_out(q: Quantized, matrix: Matrix, weight: torch.Tensor, transposed: bool) -> tuple[Array, Array, int]:
    """Codes in the weight's own layout, scales (1-D per channel, 2-D in blocks) and the axis that DequantizeLinear wants."""
    codes = matrix.whole(q.codes, weight)
    if q.scales.shape[1] == 1:
        stored = codes.t() if transposed else codes
        return (
            np.ascontiguousarray(stored.numpy()),
            q.scales[:, 0].contiguous().numpy(),
            1 if transposed else matrix.axis,
        )
    if transposed:  # [K, N] in blocks along its first axis
        return np.ascontiguousarray(codes.t().numpy()), np.ascontiguousarray(q.scales.t().numpy()), 0
    return np.ascontiguousarray(codes.numpy()), q.scales.contiguous().numpy(), 1


def _integers(codes: Array, bits: int, name: str) -> onnx.TensorProto:
    """An INT8 tensor, or an INT4 one with two codes per byte, the low nibble first."""
    if bits == 8:
        return helper.make_tensor(name, INTEGER[8], codes.shape, codes.tobytes(), raw=True)
    flat = codes.reshape(-1).astype(np.int8).view(np.uint8) & 0x0F
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return helper.make_tensor(name, INTEGER[4], codes.shape, (flat[0::2] | (flat[1::2] << 4)).tobytes(), raw=True)
