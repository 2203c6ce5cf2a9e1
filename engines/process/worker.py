"""The program of an engine child: JSON requests on standard input, JSON answers on standard output.

Requests: {"do": "load", "path", "threads", "engine", "provider"}, {"do": "time", "prompt", "tokens", "batch"},
{"do": "score", …}, {"do": "logits", "ids", "out", "prompt"}, {"do": "memory"}, {"do": "profile", "path", "threads",
"prompt", "tokens", "repeats"} (ONNX Runtime); for a module of a plug-in {"do": "forward", "inputs", "out"}. It imports
numpy and the one engine that its argument names, so that its memory is the engine's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.common.errors import ParetuneError
from paretune.engines.catalog import engine_module
from paretune.engines.decoder import CPU, EngineDecoder
from paretune.engines.process.scoring import score_windows

if TYPE_CHECKING:
    from paretune.engines.onnxruntime.module import Forward

DEFAULT = "onnxruntime"


def peak_bytes() -> int:
    """Highest resident size of this process so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Server:
    """Answers one request at a time; keeps the last loaded model."""

    def __init__(self, engine: str = DEFAULT) -> None:
        self.engine = engine
        self.model: EngineDecoder | Forward | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request of the module's protocol with JSON-able data.

        Raises ValueError for an unknown request, and for one that needs a model before any is loaded.
        """
        action = request["do"]
        if action == "memory":
            return {"peak_bytes": peak_bytes()}
        if action == "profile":
            from paretune.engines.onnxruntime.node_times import (
                profile_nodes,  # late: what it imports is not the engine's memory
            )

            return profile_nodes(request)
        if action == "load":
            return self._load(request)
        if self.model is None:
            raise ValueError("no model is loaded")
        if action == "time":
            ttft, steps = self.model.time_generation(request["prompt"], request["tokens"], request.get("batch", 1))
            return {"ttft_ms": ttft, "step_ms": steps, "cpu_s": time.process_time()}
        if isinstance(self.model, EngineDecoder):
            return _answer(self.model, action, request)
        if action == "forward":
            from paretune.engines.onnxruntime.module import run_batches

            return run_batches(self.model, request)
        raise ValueError(f"a module of a plug-in cannot {action!r}")

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        self.model = None
        engine = engine_module(request.get("engine", self.engine))
        start = time.perf_counter()
        self.model = engine.open_model(request["path"], request["threads"], request.get("provider", CPU))
        return {"load_ms": (time.perf_counter() - start) * 1e3}


def _answer(decoder: EngineDecoder, action: str, request: dict[str, Any]) -> dict[str, Any]:
    if action == "score":
        return score_windows(decoder, request)
    if action == "logits":
        ids = np.load(request["ids"], allow_pickle=False)
        stepped = "prompt" in request
        np.save(request["out"], decoder.stepped_logits(ids, request["prompt"]) if stepped else decoder.logits(ids))
        return {}
    raise ValueError(f"unknown request {action!r}")


def main() -> None:
    """Answer requests, one a line, until standard input ends. Errors become answers; the child dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the parent
    server, answers = Server(*sys.argv[1:2]), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr, never between the answers
    with contextlib.suppress(ParetuneError):  # said when a model is to be loaded
        engine_module(server.engine)
    for line in sys.stdin:
        try:
            answer = {"ok": True, **server.answer(json.loads(line))}
        except ParetuneError as error:
            answer = {"ok": False, "kind": type(error).__name__, "error": error.problem, "remedy": error.remedy}
        except Exception as error:  # reported to the parent, which decides
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
