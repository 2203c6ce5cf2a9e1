"""An artifact's ONNX graph, run node by node in torch: the file that ships, not a model that resembles it.

Weights are unpacked when the graph is loaded: torch has no kernels for what ONNX Runtime's int4 and int8 matrices are, so they
are float32 in memory and in arithmetic, and only their values are the artifact's. Integers that say shapes and lengths
stay on the CPU; everything else lies on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import torch

from paretune.engines.torch.node import Node
from paretune.engines.torch.ops import OPS
from paretune.engines.torch.quantized import PREPARE

Values = dict[str, torch.Tensor]


class Graph:
    """Raises ValueError with the node for an operator that torch has no translation of here."""

    def __init__(self, path: str, device: torch.device) -> None:
        model = onnx.load(path)
        self.inputs = {i.name: _shape(i) for i in model.graph.input}
        self.outputs = {o.name: _shape(o) for o in model.graph.output}
        self.constants = {t.name: _tensor(t) for t in model.graph.initializer}
        nodes = [_node(n) for n in model.graph.node]
        del model  # as large as all weights
        self.nodes = self._prepared(nodes)
        used = {name for node in self.nodes for name in node.inputs}
        self.constants = {n: _placed(t, device) for n, t in self.constants.items() if n in used}
        self._say_what_dies()

    def run(self, feeds: Mapping[str, torch.Tensor]) -> Values:
        """All outputs that were not read again, by name."""
        values = dict(feeds)
        for node in self.nodes:
            arguments = [self.constants[n] if n in self.constants else values[n] if n else None for n in node.inputs]
            found = OPS[node.op](node.attributes, *arguments)
            values.update(zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False))
            for name in node.dead:
                values.pop(name, None)
        return values

    def _prepared(self, nodes: Iterable[Node]) -> list[Node]:
        """Compute what depends on constants alone, and unpack quantized weights."""
        rest = []
        for node in nodes:
            if node.op not in OPS:
                raise ValueError(f"No Op registered for {node.op} in the engine torch, at node '{node.name}'")
            if node.op in PREPARE:
                PREPARE[node.op](node, self.constants)
            if node.inputs and all(name in self.constants for name in node.inputs if name):
                found = OPS[node.op](node.attributes, *(self.constants.get(name) for name in node.inputs))
                self.constants.update(zip(node.outputs, found if isinstance(found, tuple) else (found,), strict=False))
            else:
                rest.append(node)
        return rest

    def _say_what_dies(self) -> None:
        seen = {*self.outputs, *self.constants}
        for node in reversed(self.nodes):
            named = {n for n in (*node.inputs, *node.outputs) if n}
            node.dead = tuple(named - seen)
            seen |= named


def _node(node: onnx.NodeProto) -> Node:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return Node(node.op_type, node.name, list(node.input), list(node.output), attributes)


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes; 0 for the dynamic ones."""
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


def _tensor(tensor: onnx.TensorProto) -> torch.Tensor:
    if tensor.data_type == onnx.TensorProto.BFLOAT16:  # numpy has none
        bits = np.frombuffer(tensor.raw_data, np.int16).copy()
        return torch.from_numpy(bits).view(torch.bfloat16).view(tuple(tensor.dims))
    return torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor if tensor.dtype in (torch.int64, torch.int32) else tensor.to(device)
