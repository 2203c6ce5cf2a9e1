"""The program of an engine child: JSON requests on standard input, JSON answers on standard output.

Requests: {"do": "load", "path", "threads"}, {"do": "time", "prompt", "tokens"}, {"do": "score", …}, {"do": "memory"}.
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

from paretune.engines.onnxruntime_decoder import Decoder
from paretune.engines.scoring import score_windows


def peak_bytes() -> int:
    """Highest resident size of this process so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class Server:
    """Answers one request at a time; keeps the last loaded model."""

    def __init__(self) -> None:
        self.decoder: Decoder | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        action = request["do"]
        if action == "memory":
            return {"peak_bytes": peak_bytes()}
        if action == "load":
            self.decoder = None
            start = time.perf_counter()
            self.decoder = Decoder(request["path"], request["threads"])
            return {"load_ms": (time.perf_counter() - start) * 1e3}
        if self.decoder is None:
            raise ValueError("no model is loaded")
        if action == "time":
            ttft, steps = self.decoder.time_generation(request["prompt"], request["tokens"])
            return {"ttft_ms": ttft, "step_ms": steps, "cpu_s": time.process_time()}
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
