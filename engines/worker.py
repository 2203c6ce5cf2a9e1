"""The program of an engine child: JSON requests on standard input, JSON answers on standard output.

Requests: {"do": "load", "path", "threads"}, {"do": "time", "prompt", "tokens"}, {"do": "score", …}, {"do": "memory"},
{"do": "profile", "path", "threads", "prompt", "tokens", "repeats"}; for a
module of a plug-in {"do": "forward", "inputs", "out"}.
It imports numpy and ONNX Runtime only, so that its memory is the engine's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from paretune.engines.onnxruntime_decoder import Decoder, open_session
from paretune.engines.onnxruntime_module import KIND, Forward, run_batches
from paretune.engines.scoring import score_windows


def peak_bytes() -> int:
    """Highest resident size of this process so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def open_model(path: str, threads: int) -> Decoder | Forward:
    """What the graph says it is: a module of a plug-in, or a decoder."""
    session = open_session(path, threads)
    if KIND in session.get_modelmeta().custom_metadata_map:
        return Forward(session)
    return Decoder(path, threads, session)


class Server:
    """Answers one request at a time; keeps the last loaded model."""

    def __init__(self) -> None:
        self.decoder: Decoder | Forward | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        action = request["do"]
        if action == "memory":
            return {"peak_bytes": peak_bytes()}
        if action == "profile":
            from paretune.engines.node_times import profile_nodes  # late: what it imports is not the engine's memory

            return profile_nodes(request)
        if action == "load":
            self.decoder = None
            start = time.perf_counter()
            self.decoder = open_model(request["path"], request["threads"])
            return {"load_ms": (time.perf_counter() - start) * 1e3}
        if self.decoder is None:
            raise ValueError("no model is loaded")
        if action == "time":
            ttft, steps = self.decoder.time_generation(request["prompt"], request["tokens"])
            return {"ttft_ms": ttft, "step_ms": steps, "cpu_s": time.process_time()}
        if isinstance(self.decoder, Forward):
            if action == "forward":
                return run_batches(self.decoder, request)
            raise ValueError(f"a module of a plug-in cannot {action!r}")
        if action == "score":
            return score_windows(self.decoder, request)
        if action == "logits":
            np.save(request["out"], self.decoder.logits(np.load(request["ids"], allow_pickle=False)))
            return {}
        raise ValueError(f"unknown request {action!r}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the parent
    server, answers = Server(), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr, never between the answers
    for line in sys.stdin:
        try:
            answer = {"ok": True, **server.answer(json.loads(line))}
        except Exception as error:  # reported to the parent, which decides
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
