"""The child of calibrate.py: prints bandwidth and peaks as JSON. Thread counts of numpy's BLAS come from the environment.

python -m paretune.hardware_profiles.calibration_child THREADS SECONDS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from paretune.hardware_profiles.detect import last_level_cache_bytes, memory_bytes

# Far beyond any CPU's cache, but no more than an eighth of a small machine's memory.
MOST_BYTES, LEAST_BYTES = 2**28, 2**24
SIDE = 1024
LEAST_RUNS = 3


def main(threads: int, seconds: float) -> dict[str, float | None]:
    """The fields of calibrate.Peaks, `seconds` shared evenly."""
    share = seconds / 6
    most = memory_bytes() // 8
    found: dict[str, float | None] = {"bandwidth_gb_per_s": bandwidth(max(LEAST_BYTES, min(MOST_BYTES, most)), share)}
    if (cache := last_level_cache_bytes()) is not None:
        found |= {"cache_bytes": cache // 2, "cache_gb_per_s": bandwidth(cache // 4, share)}
    try:
        import onnx  # noqa: F401
    except ImportError:
        return found | {"fp32_gflop_per_s": numpy_fp32(share), "int8_gop_per_s": None}
    return found | {
        "fp32_gflop_per_s": product("MatMul", np.float32, np.float32, threads, share),
        "int8_gop_per_s": product("MatMulInteger", np.uint8, np.int8, threads, share),
    }


def bandwidth(size: int, seconds: float) -> float:
    """GB/s of reading a matrix of `size` bytes again and again: the better of a matrix-vector and a dot product, `seconds` each."""
    matrix = np.ones((max(2, size // 4 // 1024 // 2 * 2), 1024), np.float32)
    vector, halves = np.ones(1024, np.float32), matrix.reshape(2, -1)
    product = best(lambda: matrix @ vector, seconds)
    dot = best(lambda: halves[0] @ halves[1], seconds)
    return matrix.nbytes / min(product, dot) / 1e9


def numpy_fp32(seconds: float) -> float:
    """GFLOP/s of a product of two square fp32 matrices by numpy's BLAS."""
    left, right = (np.random.default_rng(i).standard_normal((SIDE, SIDE), np.float32) for i in range(2))
    out = np.empty((SIDE, SIDE), np.float32)
    return 2 * SIDE**3 / best(lambda: np.matmul(left, right, out=out), seconds) / 1e9


def product(op: str, left: type[np.generic], right: type[np.generic], threads: int, seconds: float) -> float:
    """Giga-operations per second of ONNX Runtime's `op` on square matrices of these types, the right one constant."""
    generator = np.random.default_rng(0)
    low = 0 if left is np.uint8 else -100
    a = generator.integers(low, 100, (SIDE, SIDE)).astype(left)
    session = _session(op, a, generator.integers(-100, 100, (SIDE, SIDE)).astype(right), threads)
    return 2 * SIDE**3 / best(lambda: session.run(None, {"a": a}), seconds) / 1e9


def best(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest run, after one that is not counted."""
    run()
    fastest, until, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < LEAST_RUNS or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
        runs += 1
    return fastest


def _session(op: str, left: Any, right: Any, threads: int) -> Any:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    result = TensorProto.FLOAT if op == "MatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(left.dtype), left.shape)],
        [helper.make_tensor_value_info("y", result, [SIDE, SIDE])],
        [numpy_helper.from_array(right, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")  # as the engine runs them
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), float(sys.argv[2]))))
