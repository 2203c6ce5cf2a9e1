"""Execution providers of ONNX Runtime: which of them this installation has, and what to install for the others.

ONNX Runtime itself only warns when a provider is missing and runs on the CPU; a measurement must not.
"""

from __future__ import annotations

from typing import Any

import onnxruntime as ort

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.engines.decoder import CPU

GPU_BUILD = "pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]' (never both in one environment)"
INSTALL = {
    CPU: "pip install onnxruntime",
    "CUDAExecutionProvider": GPU_BUILD,
    "TensorrtExecutionProvider": f"{GPU_BUILD} and tensorrt",
    "MIGraphXExecutionProvider": "install ROCm, pip uninstall onnxruntime, then pip install onnxruntime-migraphx",
    "ROCMExecutionProvider": "install ROCm and an onnxruntime-rocm before 1.23; later ones have MIGraphXExecutionProvider",
}
ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def require_provider(name: str) -> None:
    """Raises UsageError for a name that is none, EnvironmentProblem with what to install for one that is not there."""
    available = ort.get_available_providers()
    if name in available and name in INSTALL:
        return
    if name not in INSTALL:
        raise UsageError(
            f"the execution provider must be one of {', '.join(INSTALL)}, but got {name!r}", "correct the profile"
        )
    raise EnvironmentProblem(
        f"ONNX Runtime {ort.__version__} here has no {name}, only {', '.join(available)}", INSTALL[name]
    )


def require_in_use(session: Any, name: str) -> None:
    """Raises EnvironmentProblem if the session has silently left its provider for the CPU (a driver or library is missing)."""
    used = session.get_providers()
    if name not in used:
        raise EnvironmentProblem(
            f"ONNX Runtime has {name} but could not start it and fell back to {', '.join(used)}",
            f"look for its driver and libraries; {INSTALL[name]}",
        )


def memory_of(name: str) -> str:
    """Where the KV cache and the logits of a provider lie, in the words of OrtValue: `cuda` or `cpu`."""
    return "cuda" if name in ON_CUDA else "cpu"
