"""One ONNX decoder in ONNX Runtime: scoring whole windows, and decoding token by token with a real KV cache.

Imported in engine children only. The KV cache is one buffer per layer, bound as past and present at once, so that
GroupQueryAttention appends in place (no copies between steps).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort


def open_session(path: str, threads: int, trace: str = "") -> Any:
    """A session with explicit threads; spinning is off, because it doubles the spread on shared machines.

    Where ONNX Runtime makes a MatMulNBits of a DequantizeLinear and a MatMul itself, activations stay float (its own choice
    would round them to 8 bits); nodes that are MatMulNBits already say what they want. `trace`: where its own profile goes, if any.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    if trace:
        options.enable_profiling, options.profile_file_prefix = True, trace
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Decoder:
    """A decoder in a session of its own, or in the one that is given."""

    def __init__(self, path: str, threads: int, session: Any = None) -> None:
        self.session = open_session(path, threads) if session is None else session
        self.caches = [
            (i.name, [int(i.shape[1]), int(i.shape[3])])
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values.")
        ]
        self.vocab = int(self.session.get_outputs()[0].shape[2])

    def logits(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits [batch, length, vocab] of token ids [batch, length] without a past."""
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for name, (heads, size) in self.caches:
            feeds[name] = np.zeros((ids.shape[0], heads, 0, size), np.float32)
        found: npt.NDArray[np.float32] = self.session.run(["logits"], feeds)[0]
        return found

    def time_generation(self, prompt: int, new_tokens: int) -> tuple[float, list[float]]:
        """Milliseconds of one prefill of `prompt` tokens, and of each of `new_tokens` decode steps after it (batch 1)."""
        binding = self.session.io_binding()
        self._bind_caches(binding, prompt + new_tokens)
        mask = np.ones((1, prompt + new_tokens), np.int64)
        ids = np.arange(1, prompt + 1, dtype=np.int64)[None] % self.vocab
        logits = ort.OrtValue.ortvalue_from_shape_and_type([1, prompt, self.vocab], np.float32)
        ttft = self._step(binding, ids, mask[:, :prompt], logits)
        step_logits = ort.OrtValue.ortvalue_from_shape_and_type([1, 1, self.vocab], np.float32)
        token = ids[:, -1:]
        steps = []
        for i in range(new_tokens):
            steps.append(self._step(binding, token, np.ascontiguousarray(mask[:, : prompt + i + 1]), step_logits))
            token = (token * 31 + 7) % self.vocab
        return ttft, steps

    def _step(self, binding: Any, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64], logits: Any) -> float:
        binding.bind_ortvalue_input("input_ids", ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids)))
        binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(mask))
        binding.bind_ortvalue_output("logits", logits)
        start = time.perf_counter()
        self.session.run_with_iobinding(binding)
        return (time.perf_counter() - start) * 1e3

    def _bind_caches(self, binding: Any, length: int) -> None:
        for name, (heads, size) in self.caches:
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, length, size), np.float32))
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
