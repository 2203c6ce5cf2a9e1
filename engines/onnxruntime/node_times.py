"""What every node of a graph takes, by ONNX Runtime's own profile. Imported in engine children only; `rows_of` is pure.

The engine counts whole microseconds, so a node that takes less shows as 0 in most runs; means over many runs, with the tails
cut off, still tell it from one that takes nothing.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from paretune.engines.onnxruntime.decoder import Decoder, open_session

PREFILL, DECODE, WARM_UP = "prefill", "decode", "warm-up"
TAIL = 0.25  # of the runs, left out at either end: on a busy machine one in five is odd
SUFFIX = "_kernel_time"


def profile_nodes(request: Mapping[str, Any]) -> dict[str, Any]:
    """Rows (see `rows_of`) of `repeats` generations of the decoder in `path`, after one to warm up.

    Each is a prefill of `prompt` tokens and `tokens` decode steps after it, on `threads` threads.
    """
    prompt, tokens = int(request["prompt"]), int(request["tokens"])
    phases = [WARM_UP] * (1 + tokens)
    with tempfile.TemporaryDirectory(prefix="paretune-") as folder:
        session = open_session(request["path"], request["threads"], trace=str(Path(folder) / "trace"))
        decoder = Decoder(request["path"], request["threads"], session)
        decoder.time_generation(prompt, tokens)
        for _ in range(int(request["repeats"])):
            decoder.time_generation(prompt, tokens)
            phases += [PREFILL] + [DECODE] * tokens
        return rows_of(json.loads(Path(session.end_profiling()).read_text("utf8")), phases)


def rows_of(events: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> dict[str, Any]:
    """{"rows", "run_ms"} of a trace whose runs, in order of time, are the `phases`.

    A row per node and phase, in order of execution: name, op, phase, ms (trimmed mean of a run's), inputs and output (shapes),
    moved_bytes (activations in and out). `run_ms` is the median of whole runs by phase. Warm-up is left out.
    Raises ValueError if the trace has another number of runs, as one has that the engine has cut short.
    """
    runs = sorted(
        (int(e["ts"]), int(e["ts"]) + int(e["dur"]))
        for e in events
        if e.get("cat") == "Session" and e["name"] == "model_run"
    )
    if len(runs) != len(phases):
        raise ValueError(f"the engine's profile must have {len(phases)} runs, but has {len(runs)}")
    starts = [start for start, _ in runs]
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for e in sorted((e for e in events if e.get("cat") == "Node"), key=lambda e: int(e["ts"])):
        number = bisect_right(starts, int(e["ts"])) - 1
        if not e["name"].endswith(SUFFIX) or number < 0 or phases[number] == WARM_UP:
            continue
        found.setdefault((phases[number], e["name"], str(e["args"].get("node_index"))), []).append(e)
    rows = [_row(phase, name.removesuffix(SUFFIX), same) for (phase, name, _), same in found.items()]
    spans: dict[str, list[int]] = {}
    for phase, (start, end) in zip(phases, runs, strict=True):
        spans.setdefault(phase, []).append(end - start)
    return {"rows": rows, "run_ms": {p: median(us) / 1e3 for p, us in spans.items() if p != WARM_UP}}


def _row(phase: str, name: str, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    facts = events[-1]["args"]
    outputs = _shapes(facts.get("output_type_shape", ()))
    return {
        "name": name,
        "op": facts["op_name"],
        "phase": phase,
        "ms": trimmed_mean([float(e["dur"]) for e in events]) / 1e3,
        "inputs": _shapes(facts.get("input_type_shape", ())),
        "output": outputs[0] if outputs else [],
        "moved_bytes": int(facts.get("activation_size", 0)) + int(facts.get("output_size", 0)),
    }


def _shapes(described: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """[[1, 64]] of [{"float": [1, 64]}]."""
    return [[int(d) for d in shape] for one in described for shape in one.values()]


def trimmed_mean(values: Sequence[float]) -> float:
    """Mean of the middle half (the interquartile mean)."""
    cut = int(TAIL * len(values))
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept)
