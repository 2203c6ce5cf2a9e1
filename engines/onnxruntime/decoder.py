"""One ONNX decoder in ONNX Runtime: scoring whole windows, and decoding token by token with a real KV cache.

Imported in engine children only. The KV cache is one buffer per layer, bound as past and present at once, so that
GroupQueryAttention appends in place (no copies between steps).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime as ort

from paretune.engines.decoder import CPU, EngineDecoder, Ids, Logits
from paretune.engines.onnxruntime.module import KIND, Forward
from paretune.engines.onnxruntime.providers import memory_of, require_in_use, require_provider


def open_model(path: str, threads: int, provider: str = CPU) -> Decoder | Forward:
    """What the graph says it is: a module of a plug-in, or a decoder."""
    session = open_session(path, threads, provider=provider)
    if KIND in session.get_modelmeta().custom_metadata_map:
        return Forward(session)
    return Decoder(path, threads, session, provider)


def open_session(path: str, threads: int, trace: str = "", provider: str = CPU) -> Any:
    """A session with explicit threads; spinning is off, because it doubles the spread on shared machines.

    Where ONNX Runtime makes a MatMulNBits of a DequantizeLinear and a MatMul itself, activations stay float (its own choice
    would round them to 8 bits); nodes that are MatMulNBits already say what they want. 8-bit products are exact on x86 CPUs
    without VNNI too, where ONNX Runtime's faster default adds pairs of them in 16 bits and clips the sum. What `provider`
    has no kernel for runs on the CPU. `trace`: where the engine's own profile goes, if any.
    Raises EnvironmentProblem if the provider is not there, or cannot start.
    """
    require_provider(provider)
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
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(path, options, providers=list(dict.fromkeys([provider, CPU])))
    require_in_use(session, provider)
    return session


class Decoder(EngineDecoder):
    """A decoder in a session of its own, or in the one that is given."""

    def __init__(self, path: str, threads: int, session: Any = None, provider: str = CPU) -> None:
        self.session = open_session(path, threads, provider=provider) if session is None else session
        self.memory = memory_of(provider)
        self.caches = [
            (i.name, [int(i.shape[1]), int(i.shape[3])])
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values.")
        ]
        self.vocab = int(self.session.get_outputs()[0].shape[2])

    def logits(self, ids: Ids) -> Logits:
        """Return the logits [batch, length, vocab] of `ids` [batch, length], computed in one run with empty caches."""
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for name, (heads, size) in self.caches:
            feeds[name] = np.zeros((ids.shape[0], heads, 0, size), np.float32)
        found: Logits = self.session.run(["logits"], feeds)[0]
        return found

    def begin(self, batch: int, length: int) -> Shared:
        """Return a generation with an empty KV cache for `batch` rows of up to `length` tokens."""
        return Shared(self, batch, length)


class Shared:
    """A generation whose past and present share one buffer per layer."""

    def __init__(self, decoder: Decoder, batch: int, length: int) -> None:
        self.session, self.memory, self.vocab = decoder.session, decoder.memory, decoder.vocab
        self.binding = self.session.io_binding()
        self.mask, self.done = np.ones((batch, length), np.int64), 0
        self.outputs: dict[int, Any] = {}
        for name, (heads, size) in decoder.caches:
            cache = ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, heads, length, size), np.float32), self.memory, 0)
            self.binding.bind_ortvalue_input(name, cache)
            self.binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)

    def step(self, ids: Ids) -> float:
        """Run `ids` [batch, length] after everything run before; return the milliseconds that the session took."""
        batch, length = ids.shape
        self.done += length
        if length not in self.outputs:
            shape = [batch, length, self.vocab]
            self.outputs[length] = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self.memory, 0)
        self.last = self.outputs[length]
        mask = np.ascontiguousarray(self.mask[:, : self.done])
        self.binding.bind_ortvalue_input("input_ids", ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(ids)))
        self.binding.bind_ortvalue_input("attention_mask", ort.OrtValue.ortvalue_from_numpy(mask))
        self.binding.bind_ortvalue_output("logits", self.last)
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return (time.perf_counter() - start) * 1e3

    def logits(self) -> Logits:
        """Return a copy of the logits [batch, length, vocab] of the last step."""
        found: Logits = self.last.numpy().copy()
        return found
