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

# Far beyond any CPU's cache, but no more than an eighth of a small machine's memory.
MOST_BYTES, LEAST_BYTES = 2**28, 2**24
SIDE = 1024
LEAST_RUNS = 3


def main(threads: int, seconds: float) -> dict[str, float | None]:
    """The three figures, `seconds` shared evenly."""
    share = seconds / 4
    return {
        "bandwidth_gb_per_s": bandwidth(share),
        "fp32_gflop_per_s": fp32(share),
        "int8_gop_per_s": int8(threads, share),
    }


def bandwidth(seconds: float) -> float:
    """GB/s of reading a matrix once: the better of a matrix-vector product and a dot product, `seconds` each."""
    from paretune.hardware_profiles.detect import memory_bytes

    size = int(max(LEAST_BYTES, min(MOST_BYTES, memory_bytes() / 8)))
    matrix = np.ones((size // 4 // 4096, 4096), np.float32)
    vector, halves = np.ones(4096, np.float32), matrix.reshape(2, -1)
    product = best(lambda: matrix @ vector, seconds)
    dot = best(lambda: halves[0] @ halves[1], seconds)
    return matrix.nbytes / min(product, dot) / 1e9


def fp32(seconds: float) -> float:
    """GFLOP/s of a product of two square fp32 matrices."""
    left, right = (np.random.default_rng(i).standard_normal((SIDE, SIDE), np.float32) for i in range(2))
    out = np.empty((SIDE, SIDE), np.float32)
    return 2 * SIDE**3 / best(lambda: np.matmul(left, right, out=out), seconds) / 1e9


def int8(threads: int, seconds: float) -> float | None:
    """Giga-operations per second of uint8 activations with constant int8 weights in ONNX Runtime; None without onnx."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        return None
    session = _integer_product(threads)
    left = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE), dtype=np.uint8)
    return 2 * SIDE**3 / best(lambda: session.run(None, {"a": left}), seconds) / 1e9


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


def _integer_product(threads: int) -> Any:
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(1).integers(-127, 127, (SIDE, SIDE), dtype=np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "integer_product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [SIDE, SIDE])],
        [numpy_helper.from_array(weights, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), float(sys.argv[2]))))
