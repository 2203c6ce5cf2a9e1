"""Quantized matrices of an artifact in torch: their codes as float32 weights, and the rounding of activations.

The values are those of ONNX Runtime's kernels; the integer arithmetic is simulated in float32, whose sums of products of 8 bits
are exact up to 2^24 and rounded beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from paretune.engines.torch.node import Node

Tensor = torch.Tensor
Attributes = dict[str, Any]
Constants = dict[str, Tensor]
INT8_ACTIVATIONS = 4  # the accuracy_level of MatMulNBits


def matmul_nbits(a: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T with the unpacked weight [N, K]; activations are rounded per block of K where `accuracy_level` says so."""
    if a.get("accuracy_level", 0) == INT8_ACTIVATIONS and not (a["bits"] == 2 and a["block_size"] == 16):
        x = _rounded(x, a["block_size"])
    return linear(x, weight)


def _rounded(x: Tensor, block: int) -> Tensor:
    """To int8 per `block` of the last dimension, symmetric. ONNX Runtime has no such kernel for 2 bits in blocks of 16."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30)
    return (torch.round(blocks / scale) * scale).flatten(-2)


def quantize_linear(_: Attributes, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """round(x / scale) + zero, clamped to the range of `zero`'s integer type and returned in that type."""
    limits = torch.iinfo(zero.dtype)
    return (torch.round(x / scale) + zero).clamp_(limits.min, limits.max).to(zero.dtype)


def dequantize_linear(a: Attributes, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """With one scale, or one per entry along `axis`."""
    if scale.ndim > 1:
        raise ValueError(f"DequantizeLinear in the engine torch takes one scale or a row, but got {list(scale.shape)}")

    def along(row: Tensor) -> Tensor:
        return row if row.ndim == 0 else row.view([-1 if i == a.get("axis", 1) else 1 for i in range(codes.ndim)])

    centred = codes.float() if zero is None else codes.float() - along(zero).float()
    return centred * along(scale)


def dynamic_quantize_linear(_: Attributes, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, scale and zero point from the smallest and largest entry of the whole tensor."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, 255))
    codes = (torch.round(x / scale) + zero).clamp_(0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def matmul_integer(_: Attributes, x: Tensor, weight: Tensor, zero: Tensor, _weight_zero: Tensor) -> Tensor:
    """(x - zero) @ weight, with a weight that was made float32, less its zero point, when the graph was loaded."""
    return (x.float() - zero.float()) @ weight


def unpacked(packed: Tensor, scales: Tensor, bits: int) -> Tensor:
    """float32 [rows, columns] of codes that lie in bytes, lowest bits first, less the implied zero point, times their scales."""
    rows, per_byte = packed.shape[0], 8 // bits
    parts = [(packed.reshape(rows, -1) >> (bits * i)) & (2**bits - 1) for i in range(per_byte)]
    codes = torch.stack(parts, -1).view(rows, -1).float().sub_(2 ** (bits - 1))
    blocks = codes.view(rows, scales.numel() // rows, -1)
    return blocks.mul_(scales.view(rows, -1, 1)).view(rows, -1)


def _unpack(node: Node, constants: Constants) -> None:
    """Weights of MatMulNBits, [data, codes, scales]; of GatherBlockQuantized, [codes, indices, scales]. A table that both
    read is unpacked once."""
    gathers = node.op == "GatherBlockQuantized"
    codes, scales = (node.inputs[0], node.inputs[2]) if gathers else node.inputs[1:3]
    if len(node.inputs) > 3:
        raise ValueError(f"No Op registered for {node.op} with zero points in the engine torch, at node '{node.name}'")
    packed, bits = constants[codes], node.attributes["bits"]
    name = f"unpacked from {packed.data_ptr()}"
    if name not in constants:
        constants[name] = unpacked(packed, constants[scales], bits)
    node.inputs = [name, node.inputs[1]] if gathers else [node.inputs[0], name]


def _widen(node: Node, constants: Constants) -> None:
    weight, zero = node.inputs[1], node.inputs[3]
    name = f"float {weight}"
    constants[name] = constants[weight].float() - constants[zero].float()
    node.inputs[1] = name


PREPARE: dict[str, Callable[[Node, Constants], None]] = {
    "MatMulNBits": _unpack,
    "GatherBlockQuantized": _unpack,
    "MatMulInteger": _widen,
}
