"""One ONNX decoder in torch, on the CPU or on CUDA. Imported in engine children only.

It runs the artifact's own graph (graph.py), so it is a second opinion on what the file computes, and what a target with
torch alone would take. Its times are torch's: quantized weights are float32 there.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.engines.decoder import CPU, EngineDecoder, Ids, Logits
from paretune.engines.torch.graph import Graph

DEVICES = {CPU: "cpu", "CUDAExecutionProvider": "cuda", "ROCMExecutionProvider": "cuda"}  # ROCm's torch says cuda, too
PAST = "past_key_values."


def open_model(path: str, threads: int, provider: str = CPU) -> Decoder:
    """Open a decoder's graph on the provider's device.

    Raises UsageError for a provider that torch does not run on, EnvironmentProblem where torch finds no such device,
    ValueError for a module of a plug-in.
    """
    if provider not in DEVICES:
        raise UsageError(
            f"the engine torch runs on {' or '.join(DEVICES)}, but the profile asks for {provider}",
            "correct the profile",
        )
    if DEVICES[provider] == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"torch {torch.__version__} here finds no CUDA device, which {provider} needs",
            "install the NVIDIA driver and a torch that is built for CUDA (https://pytorch.org/get-started)",
        )
    return Decoder(path, threads, DEVICES[provider])


class Decoder(EngineDecoder):
    """A decoder whose graph torch runs on one device. Raises ValueError for a graph without the input `input_ids`."""

    def __init__(self, path: str, threads: int, device: str = "cpu") -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        self.device = torch.device(device)
        with torch.inference_mode():
            self.graph = Graph(path, self.device)
        if "input_ids" not in self.graph.inputs:
            raise ValueError(f"a decoder has the input input_ids, but this graph has {', '.join(self.graph.inputs)}")
        self.caches = {name: (s[1], s[3]) for name, s in self.graph.inputs.items() if name.startswith(PAST)}
        self.vocab = self.graph.outputs["logits"][2]

    def logits(self, ids: Ids) -> Logits:
        """Return the logits [batch, length, vocab] of `ids` [batch, length], from one run with an empty cache."""
        run = self.begin(*ids.shape)
        run.step(ids)
        return run.logits()

    def begin(self, batch: int, length: int) -> InPlace:
        """Return a generation with an empty KV cache for `batch` rows of up to `length` tokens."""
        return InPlace(self, batch, length)


class InPlace:
    """A generation whose KV cache is written in place."""

    def __init__(self, decoder: Decoder, batch: int, length: int) -> None:
        self.graph, self.device, self.done = decoder.graph, decoder.device, 0
        self.mask = torch.ones(batch, length, dtype=torch.int64)
        self.caches = {
            name: torch.zeros(batch, heads, length, size, device=self.device)
            for name, (heads, size) in decoder.caches.items()
        }

    @torch.inference_mode()
    def step(self, ids: Ids) -> float:
        """Run `ids` [batch, length] after everything run before; return its milliseconds, CUDA kernels included."""
        self.done += ids.shape[1]
        feeds = {"input_ids": torch.from_numpy(ids), "attention_mask": self.mask[:, : self.done], **self.caches}
        self._wait()
        start = time.perf_counter()
        self.last = self.graph.run(feeds)["logits"]
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def logits(self) -> Logits:
        """Return a copy of the logits [batch, length, vocab] of the last step, on the CPU."""
        return np.array(self.last.cpu().numpy())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
