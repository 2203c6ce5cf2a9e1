"""What a teacher's network takes in torch: torch.profiler over a prefill and decode steps with a KV cache.

It tells what the model's own framework does, op by op and layer by layer; what ships runs in another engine, whose profile is
taken apart from this (objectives/profiler/op_costs.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from paretune.compression.network.student import EMBEDDING, Network

MARK = "paretune: "
HEAD = "head"
REPEATS = 3


@dataclass(frozen=True)
class TorchOp:
    """One kind of op in one run of a phase: milliseconds by itself, calls, operations as far as torch counts them, bytes allocated."""

    op: str
    ms: float
    calls: float
    flops: float
    allocated_bytes: float


@dataclass(frozen=True)
class TorchPhase:
    """One phase: milliseconds of a run without the profiler, and what the profiler saw of a run.

    `parts` are (name, milliseconds) of every layer, in order, and of the head.
    """

    ms: float
    ops: tuple[TorchOp, ...]
    parts: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the phase as a dictionary."""
        return asdict(self)


@torch.no_grad()
def profile_network(
    network: Network, weights: Mapping[str, torch.Tensor], prompt: int, tokens: int, threads: int
) -> dict[str, TorchPhase]:
    """The phases "prefill" (of `prompt` tokens) and "decode" (a mean of `tokens` steps after it), batch 1, fp32.

    The number of torch's threads is `threads` meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runner = _Runner(network, weights, prompt, tokens)
        runner.prefill()
        plain = {"prefill": median(_timed(runner.prefill) for _ in range(REPEATS))}
        runner.rewind()
        runner.decode()
        runner.rewind()
        plain["decode"] = _timed(runner.decode) / tokens
        with _marked(network):
            seen = {"prefill": _profiled(runner.prefill, 1)}
            runner.rewind()
            seen["decode"] = _profiled(runner.decode, tokens)
    finally:
        torch.set_num_threads(before)
    return {name: TorchPhase(plain[name], *seen[name]) for name in plain}


class _Runner:
    def __init__(self, network: Network, weights: Mapping[str, torch.Tensor], prompt: int, tokens: int) -> None:
        self.network, self.weights, self.tokens = network, weights, tokens
        self.ids = (torch.arange(1, prompt + 1) % len(weights[EMBEDDING]))[None]
        self.prompted: Any = None
        self.past: Any = None

    def prefill(self) -> None:
        self.prompted = self._step(self.ids, None)

    def rewind(self) -> None:
        """Back to where the prompt has been read: the cache grows in place."""
        self.past = copy.deepcopy(self.prompted)

    def decode(self) -> None:
        """All steps after `prefill` and `rewind`."""
        for i in range(self.tokens):
            self.past = self._step(self.ids[:, i % self.ids.shape[1]][:, None], self.past)

    def _step(self, ids: torch.Tensor, past: Any) -> Any:
        hidden, past = self.network.cached(self.weights, ids, past)
        with record_function(f"{MARK}{HEAD}"):
            self.network.logits(self.weights, hidden)
        return past


def _timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _profiled(run: Any, runs: int) -> tuple[tuple[TorchOp, ...], tuple[tuple[str, float], ...]]:
    """(ops, parts) of one of the `runs` that `run` makes."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True, profile_memory=True, acc_events=True
    ) as profiler:
        run()
    ops, parts = [], []
    for row in profiler.key_averages():
        if row.key.startswith(MARK):
            parts.append((row.key.removeprefix(MARK), row.cpu_time_total / 1e3 / runs))
        elif row.self_cpu_time_total > 0:
            memory = max(0, row.self_cpu_memory_usage)
            values = (row.self_cpu_time_total / 1e3, row.count, row.flops, memory)
            ops.append(TorchOp(row.key, *(float(v) / runs for v in values)))
    return tuple(sorted(ops, key=lambda o: (-o.ms, o.op))), tuple(sorted(parts, key=lambda p: _order(p[0])))


def _order(part: str) -> tuple[bool, int]:
    """Layers in their order, then the head."""
    return (True, 0) if part == HEAD else (False, int(part.removeprefix("layer ")))


@contextlib.contextmanager
def _marked(network: Network) -> Iterator[None]:
    """Every layer shows in the op profile under its number."""
    open_marks: dict[int, Any] = {}

    def enter(i: int, _module: nn.Module, _inputs: Any) -> None:
        open_marks[i] = record_function(f"{MARK}layer {i}")
        open_marks[i].__enter__()

    def leave(i: int, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        open_marks.pop(i).__exit__(None, None, None)

    handles: list[Any] = []
    for i, layer in enumerate(network.layers):
        handles.append(layer.register_forward_pre_hook(functools.partial(enter, i)))
        handles.append(layer.register_forward_hook(functools.partial(leave, i)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
