"""An engine in a child process: a crash, a hang or an out-of-memory kill ends the child, never the search."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from paretune.common.errors import EnvironmentProblem, Infeasible, ParetuneError, UsageError
from paretune.engines.diagnosis import place_of

RAISED: dict[str, type[ParetuneError]] = {e.__name__: e for e in (EnvironmentProblem, UsageError)}
OUT_OF_MEMORY = (
    "MemoryError",
    "bad_alloc",
    "bad allocation",
    "Failed to allocate",
    "not enough memory",
    "t allocate memory",
)


class EngineChild:
    """Talks to `paretune.engines.process.worker`, which runs `engine`. Every request has a timeout, after which the child is killed.

    `pinned` is for timing: the child stays on the last `threads` cores and its memory is asked for in huge pages (glibc's
    malloc.hugetlb), because where small pages happen to lie made one process up to 15 % slower than the next.
    `memory_bytes` limits what the child may allocate (Linux, RLIMIT_DATA: weights and buffers, not the code of libraries nor mapped
    files), so that a model too large for the target fails here and not by the kernel's choice of a process to kill.
    Raises Infeasible with the engine's own words when it refuses, crashes, hangs or runs out of memory; EnvironmentProblem if the
    engine or its execution provider is not installed, with what to install; UsageError for unknown names.
    """

    def __init__(
        self, threads: int, pinned: bool = False, engine: str = "onnxruntime", memory_bytes: int | None = None
    ) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "OPENBLAS_NUM_THREADS": "1",
        }
        if engine == "openvino":  # its kernels are chosen by the CPU: under this limit its int8 products are wrong
            environment.pop("ONEDNN_MAX_CPU_ISA", None)
        if pinned:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paretune.engines.process.worker", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        self._pending = b""
        self._model: Path | None = None
        self._memory_bytes = memory_bytes
        if memory_bytes is not None and hasattr(resource, "prlimit"):
            resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
        if pinned and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[-threads:])

    def __enter__(self) -> EngineChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def ask(self, timeout_s: float = 300.0, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Infeasible(f"the engine died: {self._last_words()}", "") from None
        if request["do"] == "load":
            self._model = Path(request["path"])
        answer: dict[str, Any] = json.loads(self._line(timeout_s))
        if not answer.pop("ok"):
            self._refuse(request["do"], answer)
        return answer

    def close(self) -> None:
        """End the child, politely first."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _refuse(self, action: str, answer: dict[str, Any]) -> NoReturn:
        error = answer["error"]
        if answer.get("kind") in RAISED:
            raise RAISED[answer["kind"]](error, answer["remedy"])
        place = place_of(error, self._model)
        named = f", at {place}" if place else ""
        raise Infeasible(f"the engine refused to {action}{named}: {error}{self._limit(error)}", "")

    def _limit(self, words: str) -> str:
        """The limit, if there is one and the engine's words are about memory."""
        if self._memory_bytes is None or not any(sign in words for sign in OUT_OF_MEMORY):
            return ""
        return f" (its memory is limited to {self._memory_bytes / 2**20:,.0f} MiB)"

    def _line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(handle, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    raise Infeasible(f"the engine gave no answer within {timeout_s:.0f} s and was stopped", "")
                data = os.read(handle, 65536)
                if not data:
                    raise Infeasible(f"the engine died: {self._last_words()}", "")
                self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        code = self._process.wait(5)
        self._errors.seek(0)
        text = self._errors.read()[-400:].decode("utf8", "replace").strip()
        return f"exit status {code}{': ' + text if text else ''}{self._limit(text)}"
