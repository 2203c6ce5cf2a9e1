"""One ONNX module of a plug-in in ONNX Runtime: whole batches for scoring, and single forwards for timing.

Imported in engine children only. The graph says its own input shapes, so nothing else needs to be known.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

KIND = "paretune.module"  # the key in the metadata of a graph
MOST_SECONDS = 0.5
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


class Forward:
    """Runs `session` at the shapes of its graph."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.names = [i.name for i in session.get_inputs()]
        self.feeds = {i.name: _example(i.shape, TYPES[i.type]) for i in session.get_inputs()}

    def run(self, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The outputs for the inputs in the order of the graph."""
        found: list[npt.NDArray[Any]] = self.session.run(None, dict(zip(self.names, inputs, strict=True)))
        return found

    def time_generation(self, _prompt: int, count: int, batch: int = 1) -> tuple[float, list[float]]:
        """Milliseconds of a first forward and of up to `count` more, fewer once half a second has passed."""
        if batch != 1:
            raise ValueError(f"a module of a plug-in runs in the batch of its graph, but was asked for {batch} of them")
        first, steps, end = self._once(), [], time.perf_counter() + MOST_SECONDS
        for _ in range(count):
            steps.append(self._once())
            if time.perf_counter() > end:
                break
        return first, steps

    def _once(self) -> float:
        start = time.perf_counter()
        self.session.run(None, self.feeds)
        return (time.perf_counter() - start) * 1e3


def run_batches(forward: Forward, request: dict[str, Any]) -> dict[str, Any]:
    """Run every batch of `request["inputs"]` (npz, arrays `batch.input`) and write `request["out"]` (npz, `batch.output`)."""
    batches: dict[int, dict[int, npt.NDArray[Any]]] = {}
    with np.load(request["inputs"], allow_pickle=False) as held:
        for name in held.files:
            batch, _, position = name.partition(".")
            batches.setdefault(int(batch), {})[int(position)] = held[name]
    found: dict[str, Any] = {}
    for batch, arrays in sorted(batches.items()):
        for i, output in enumerate(forward.run([arrays[j] for j in sorted(arrays)])):
            found[f"{batch}.{i}"] = output
    np.savez(request["out"], **found)
    return {"batches": len(batches)}


def _example(shape: list[Any], kind: Any) -> npt.NDArray[Any]:
    """Something of the right shape: noise where it is float, zeros (always a valid index) where it is not."""
    size = [int(d) for d in shape]
    if np.issubdtype(kind, np.floating):
        return np.random.default_rng(0).standard_normal(size).astype(kind)
    return np.zeros(size, kind)
