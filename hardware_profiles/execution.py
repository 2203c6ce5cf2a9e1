"""What a target computes for a pair of weights and activations that it may have no kernel for."""

from __future__ import annotations

from typing import cast

from paretune.hardware_profiles.kernels import INSTEAD, STORAGE_ONLY, Kernel
from paretune.hardware_profiles.schema import CPU_PROVIDER, Profile

# What has a kernel for 2:4 weights where a target has them at all (cuSPARSELt: 16-bit floats, int8 with int8).
KERNELS_2_4 = ("fp16/fp32", "bf16/fp32", "int8/int8", "int8/dynamic", "int8/static")

# ONNX Runtime's MatMulNBits scales every block's sum, so it reaches this share of what its plain int8 product does (measured on
# Zen 5 with VNNI at 128 and 1024 rows: 8 bits 0.26 to 0.32, 4 bits 0.23 to 0.28; docs/log.md).
BLOCKWISE_INT8 = 0.28


def executed(profile: Profile, kernel: str) -> Kernel:
    """The pair that the target computes when it is given `kernel`: that pair, or the nearest that is not coarser.

    Weights are widened to it when the file is loaded, so they are read, and lie in memory, at its width. 16-bit floats of a
    target that computes them in fp32 are such a case, whatever it lists. Raises KeyError for a pair that no profile can name.
    """
    has = set(profile.weight_formats)
    for found in (cast(Kernel, kernel), *INSTEAD[cast(Kernel, kernel)]):
        if found in has:
            return found if profile.computes_half or found not in STORAGE_ONLY else "fp32/fp32"
    return "fp32/fp32"


def widens_each_call(profile: Profile, kernel: Kernel) -> bool:
    """Whether the whole matrix is written as fp32 and read again in every call: ONNX Runtime's int8 weights with fp32
    activations on a CPU (kernels.py)."""
    return is_onnxruntime_cpu(profile) and kernel == "int8/fp32"


def is_onnxruntime_cpu(profile: Profile) -> bool:
    """Whether the target runs ONNX Runtime's CPU kernels."""
    return profile.engine == "onnxruntime" and profile.execution_provider == CPU_PROVIDER


def peak_flops(profile: Profile, kernel: Kernel) -> float:
    """Dense peak, in operations per second, of the arithmetic that multiplies by such weights; a multiply-add counts two.

    Integer activations are multiplied in int8 (int4 weights are unpacked), floating-point ones in 16 bits where the target does
    and the weights are not fp32. A peak that the profile lacks is that of the next wider arithmetic. Blockwise int8 activations on
    ONNX Runtime's CPU kernels reach `BLOCKWISE_INT8` of the int8 peak.
    """
    assert profile.peak_fp32_tflops is not None
    if kernel != "fp32/fp32" and profile.computes_half:
        assert profile.peak_fp16_tflops is not None
        floating = profile.peak_fp16_tflops
    else:
        floating = profile.peak_fp32_tflops
    keeps_floats = profile.engine == "openvino" and kernel.endswith(
        "/int8"
    )  # it does not read accuracy_level (docs/engines.md)
    if kernel.endswith("/fp32") or profile.peak_int8_tops is None or keeps_floats:
        return floating * 1e12
    blockwise = is_onnxruntime_cpu(profile) and kernel.endswith("/int8")
    return profile.peak_int8_tops * (BLOCKWISE_INT8 if blockwise else 1.0) * 1e12


def has_sparse_kernel(profile: Profile, pattern: str, kernel: Kernel) -> bool:
    """Whether zeros of this pattern (`2:4`, `unstructured`) are skipped in time and in memory by this pair's kernel."""
    return pattern in profile.sparse_patterns and (pattern != "2:4" or kernel in KERNELS_2_4)
