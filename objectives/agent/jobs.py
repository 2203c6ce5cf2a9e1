"""An agent's jobs: one after the other, each in a process of its own that can be ended at any time.

They live in memory only. An agent that dies forgets them, and its clients, who are told `unknown job`, order again; what they
have uploaded is still there.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from paretune.hardware_profiles.detect import memory_bytes
from paretune.objectives.agent.job import MODEL, REFERENCE
from paretune.objectives.agent.order import Order
from paretune.objectives.agent.store import ContentStore

MOST_WAITING, MOST_REMEMBERED = 16, 256
TIMEOUT_S = 900.0
LAST_WORDS = 400
LEAST_MEMORY_BYTES = 512 * 10**6  # Python, numpy and an engine, before any model
MEMORY_SHARE = 0.4  # of the machine's, for each of a job's two engines
COMMAND = (sys.executable, "-m", "paretune.objectives.agent.job")


class Unknown(KeyError):
    """Files that are not here; `args` are their digests."""


class TooMany(ValueError):
    """More orders than may wait."""


@dataclass
class Job:
    """`answer` is what the job process said, or why there is no such answer."""

    order: Order
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: Literal["queued", "running", "done", "failed"] = "queued"
    answer: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    cancelled: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what the agent tells of the job: id, state, and once it has ended the measurements or the error."""
        return {"id": self.id, "state": self.state, **self.answer}


class Jobs:
    """`folder` holds what a job works on and what the latency benchmark keeps; `command` starts a job process, of whose processes each may
    allocate `max_memory_bytes` (Linux)."""

    def __init__(
        self,
        store: ContentStore,
        folder: Path,
        timeout_s: float = TIMEOUT_S,
        command: tuple[str, ...] = COMMAND,
        max_memory_bytes: int | None = None,
    ) -> None:
        self.store, self.folder, self.timeout_s, self.command = store, folder, timeout_s, command
        self.max_memory_bytes = max_memory_bytes or default_memory_bytes()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        shutil.rmtree(folder / "work", ignore_errors=True)
        (folder / "work").mkdir(mode=0o700, parents=True)
        # This thread starts all job processes and lives as long as the agent: the kernel ends them when it ends.
        self._thread = threading.Thread(target=self._run_all, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> Job:
        """The job of this order; the one that there is, if its key came before. Raises Unknown or TooMany."""
        with self._changed:
            for job in self._jobs.values():
                if job.order.key == order.key:
                    return job
            if missing := sorted(d for d in order.digests if self.store.path(d) is None):
                raise Unknown(*missing)
            if sum(job.state == "queued" for job in self._jobs.values()) >= MOST_WAITING:
                raise TooMany(f"at most {MOST_WAITING} orders wait at an agent")
            job = Job(order)
            self._jobs[job.id] = job
            self._forget()
            self._changed.notify_all()
            return job

    def get(self, name: str) -> Job | None:
        """Return the job with the id `name`; None if there is none or it has been forgotten."""
        with self._changed:
            return self._jobs.get(name)

    def cancel(self, name: str) -> Job | None:
        """End a job that waits or runs; one that has ended stays as it is."""
        with self._changed:
            job = self._jobs.get(name)
            if job is not None and job.state in ("queued", "running"):
                job.cancelled = True
                if job.state == "queued":
                    _fail(job, "cancelled", "the client cancelled it")
                _end(job.process)
            return job

    def needed(self) -> frozenset[str]:
        """Digests that jobs which have not ended need."""
        with self._changed:
            unended = [job for job in self._jobs.values() if job.state in ("queued", "running")]
            return frozenset(digest for job in unended for digest in job.order.digests)

    def counts(self) -> tuple[bool, int]:
        """Whether one runs, and how many wait."""
        with self._changed:
            states = [job.state for job in self._jobs.values()]
        return "running" in states, states.count("queued")

    def close(self) -> None:
        """End the running job and start no other."""
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job.cancelled = True
                _end(job.process)
            self._changed.notify_all()
        self._thread.join(10)

    def _forget(self) -> None:
        ended = [name for name, job in self._jobs.items() if job.state in ("done", "failed")]
        for name in ended[: max(0, len(self._jobs) - MOST_REMEMBERED)]:
            del self._jobs[name]

    def _run_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                job = self._next()
                if self._closed or job is None:
                    return
                job.state = "running"
            try:
                self._run(job)
            except Exception as error:  # a full disk, a file that is gone: this job's failure, not the agent's end
                _fail(job, "problem", f"the agent could not run it: {type(error).__name__}: {error}")

    def _next(self) -> Job | None:
        return next((job for job in self._jobs.values() if job.state == "queued"), None)

    def _run(self, job: Job) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder / "work") as name, tempfile.TemporaryFile() as errors:
            self._lay_out(job.order, Path(name))
            request = {"order": job.order.to_dict(), "folder": name, "kept": str(self.folder), "parent": os.getpid()}
            told = self._talk(job, json.dumps(request).encode(), errors)
            if job.cancelled:
                _fail(job, "cancelled", "the client cancelled it")
            elif told is None:
                _fail(job, "problem", f"it took more than {self.timeout_s:.0f} s and was ended")
            else:
                _conclude(job, told, errors)

    def _talk(self, job: Job, request: bytes, errors: IO[bytes]) -> bytes | None:
        """What the job process says; nothing where the job is cancelled, None where it takes too long."""
        with self._changed:
            if job.cancelled:
                return b""
            job.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
            _limit(job.process.pid, self.max_memory_bytes)  # before it is told what to do
        try:
            return job.process.communicate(request, self.timeout_s)[0]
        except subprocess.TimeoutExpired:
            _end(job.process)
            job.process.communicate()
            return None

    def _lay_out(self, order: Order, folder: Path) -> None:
        """Hard links under the names that the job expects; the store may let go of its own names meanwhile."""
        named = {MODEL: order.model, REFERENCE: order.reference, order.data_name: order.data}
        for name, digest in named.items():
            if digest:
                os.link(self.store.folder / digest, folder / name)


def default_memory_bytes() -> int:
    """What a job's process may allocate where nothing is said: a share of this machine's memory."""
    return max(LEAST_MEMORY_BYTES, int(MEMORY_SHARE * memory_bytes()))


def _limit(pid: int, memory: int) -> None:
    """Limit what a job's process and each of its children allocates; should memory run out all the same, they go first."""
    with contextlib.suppress(ProcessLookupError, AttributeError):  # it has ended; only Linux has prlimit
        resource.prlimit(pid, resource.RLIMIT_DATA, (memory, memory))
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000", encoding="utf-8")


def _conclude(job: Job, told: bytes, errors: IO[bytes]) -> None:
    try:
        answer = json.loads(told)
    except ValueError:
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - LAST_WORDS))
        words = errors.read().decode("utf8", "replace").strip()
        assert job.process is not None
        _fail(job, "problem", f"its process ended with exit status {job.process.returncode}: {words}")
        return
    if answer.pop("ok"):
        job.answer = answer
        job.state = "done"
    else:
        _fail(job, answer["kind"], answer["problem"], answer["remedy"])


def _fail(job: Job, kind: str, problem: str, remedy: str = "") -> None:
    job.answer = {"error": {"kind": kind, "problem": problem, "remedy": remedy}}
    job.state = "failed"


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """Kill the process and what is in its session; its engine children die with it wherever they are."""
    if process is not None and process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
