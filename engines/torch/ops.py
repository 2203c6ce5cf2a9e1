"""The operators of an artifact's graph in torch, as the ONNX and com.microsoft specifications define them.

Every function takes the node's attributes and then its inputs (None where the graph leaves one out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from paretune.engines.torch import quantized
from paretune.engines.torch.attention import group_query_attention

Tensor = torch.Tensor
Attributes = dict[str, Any]
TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 10: torch.float16, 16: torch.bfloat16}


def _shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a.get("start", 0) : a.get("end")], dtype=torch.int64)


def _gather(a: Attributes, data: Tensor, indices: Tensor) -> Tensor:
    axis, rows = a.get("axis", 0), indices.to(data.device)
    found = data.index_select(axis, rows.flatten())
    return found.reshape(*data.shape[:axis], *rows.shape, *data.shape[axis + 1 :])


def _reshape(_: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(shape.tolist())])


def _slice(_: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor) -> Tensor:
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        x = x.narrow(axis, start, end - start)
    return x


def _reduce_sum(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    return x.sum(axes.tolist(), keepdim=bool(a.get("keepdims", 1)))


def _split(a: Attributes, x: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.split(x, sizes.tolist(), a.get("axis", 0)))


def _rms_norm(a: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, a.get("epsilon", 1e-5))


def _skip_rms_norm(a: Attributes, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return _rms_norm(a, total, weight), total, total, total  # the two in the middle are statistics that nobody reads


def _layer_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, a.get("epsilon", 1e-5))


def _skip_layer_norm(a: Attributes, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = x + residual
    return _layer_norm(a, total, weight, bias), total, total, total


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=a.get("approximate", b"none").decode())


OPS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Add": lambda _, x, y: x + y,
    "Sub": lambda _, x, y: x - y,
    "Mul": lambda _, x, y: x * y,
    "Max": lambda _, x, y: torch.maximum(x, y),
    "MatMul": lambda _, x, y: x @ y,
    "Cast": lambda a, x: x.to(TYPES[a["to"]]),
    "CumSum": lambda _, x, axis: x.cumsum(int(axis)),
    "Gather": _gather,
    "Gelu": _gelu,
    "LayerNormalization": _layer_norm,
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": lambda _, x: torch.sigmoid(x),
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "Slice": _slice,
    "Split": _split,
    "Transpose": lambda a, x: x.permute(*a["perm"]),
    "GroupQueryAttention": group_query_attention,
    "DequantizeLinear": quantized.dequantize_linear,
    "DynamicQuantizeLinear": quantized.dynamic_quantize_linear,
    "GatherBlockQuantized": _gather,  # of rows that were unpacked when the graph was loaded
    "MatMulInteger": quantized.matmul_integer,
    "MatMulNBits": quantized.matmul_nbits,
    "QuantizeLinear": quantized.quantize_linear,
}
