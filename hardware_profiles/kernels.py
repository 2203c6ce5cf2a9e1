"""What engines execute: pairs of weight and activation precision, and the truth about each.

ONNX Runtime on x86 CPUs has no 16-bit floating-point matrix product: fp16 and bf16 weights pass a Cast, which it folds into
an fp32 copy when it loads the file. So they halve the file, and nothing else: latency and resident memory are those of
fp32. On other engines (OpenVINO with bf16 instructions, GPUs) they are faster too; a profile of such a target lists the
same pairs, and its own measurements tell.
"""

from __future__ import annotations

from typing import Literal

Kernel = Literal[
    "fp32/fp32",
    "int8/int8",
    "int8/fp32",
    "int4/int8",
    "int4/fp32",
    "fp16/fp32",
    "bf16/fp32",
    "int8/dynamic",
    "int8/static",
    "int2/int8",
    "int2/fp32",
]

# Pairs that ONNX Runtime computes as another one: the weights are only stored so.
STORAGE_ONLY: dict[str, Kernel] = {"fp16/fp32": "fp32/fp32", "bf16/fp32": "fp32/fp32"}

# What ONNX Runtime executes on a CPU, from the op that runs to how it does. int8/fp32 is left out of what is detected: every
# call widens the whole matrix to fp32 first (7 ms per token instead of 0.25 on the embedded teacher).
ONNXRUNTIME_CPU: dict[Kernel, str] = {
    "fp32/fp32": "MatMul",
    "int8/int8": "MatMulNBits with int8 arithmetic",
    "int4/int8": "MatMulNBits with int8 arithmetic",
    "int4/fp32": "MatMulNBits with fp32 arithmetic",
    "fp16/fp32": "Cast, folded into an fp32 MatMul at load: storage only",
    "bf16/fp32": "Cast, folded into an fp32 MatMul at load: storage only",
    "int8/dynamic": "DynamicQuantizeLinear and MatMulInteger, fused, one scale per activation tensor",
    "int8/static": "QDQ, fused into MatMulIntegerToFloat, one calibrated scale per matrix",
    "int2/int8": "MatMulNBits, experimental",
}

# Where a target has no kernel for a pair, what it computes instead: never with coarser weights or activations, so that quality is
# at least that of the pair itself. The first that it has; fp32/fp32 is always there.
INSTEAD: dict[Kernel, tuple[Kernel, ...]] = {
    "int2/int8": ("int2/fp32", "int4/int8", "int4/fp32", "int8/int8", "int8/fp32", "fp16/fp32", "bf16/fp32"),
    "int2/fp32": ("int4/fp32", "int8/fp32", "fp16/fp32", "bf16/fp32"),
    "int4/int8": ("int4/fp32", "int8/int8", "int8/fp32", "fp16/fp32", "bf16/fp32"),
    "int4/fp32": ("int8/fp32", "fp16/fp32", "bf16/fp32"),
    "int8/static": ("int8/dynamic", "int8/int8", "int8/fp32", "fp16/fp32", "bf16/fp32"),
    "int8/dynamic": ("int8/int8", "int8/fp32", "fp16/fp32", "bf16/fp32"),
    "int8/int8": ("int8/fp32", "fp16/fp32", "bf16/fp32"),
    "int8/fp32": ("fp16/fp32", "bf16/fp32"),
    "fp16/fp32": (),
    "bf16/fp32": (),
    "fp32/fp32": (),
}
WEIGHT_BITS = {"int2": 2, "int4": 4, "int8": 8, "fp16": 16, "bf16": 16, "fp32": 32}


def weight_bits(kernel: str) -> int:
    """Bits of a weight that this kernel reads."""
    return WEIGHT_BITS[kernel.split("/")[0]]
