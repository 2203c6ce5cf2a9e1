"""One operating-system process per search: started from the queue, watched, started again after a crash, asked to rest at the end.

A crash of a search costs the service nothing, and a crash of the service costs a search at most what was running: its process is
asked to end (launcher.py), and the next service finds it in the queue.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paretune.hardware_profiles.errors import ParetuneError
from paretune.search.control import Verb, order, ordered
from paretune.search.database import is_taken
from paretune.search.records import now
from paretune.service.job import LIVE, Job, State
from paretune.service.queue import STATES_OF, Queue, study_state

TOKEN = "PARETUNE_TOKEN"
EVERY_S = 0.25
MOST_LOG_BYTES = 8 * 2**20
TOLD_BYTES = 2000
FINAL = (0, 2, 3, 4, 5)  # exit codes of a search that the same command would only repeat
UNSEEN = -1  # of a search that was not started here
WORDS: dict[State, Verb] = {"pausing": "pause", "stopping": "stop", "cancelling": "cancel"}
RESTED: dict[State, State] = {"pausing": "paused", "stopping": "complete", "cancelling": "cancelled"}
Command = Callable[[Job, Path, Path], list[str]]


def search_command(job: Job, spec: Path, home: Path) -> list[str]:
    """The arguments of Python for a job's search."""
    return ["-m", "paretune", "search", str(spec), "--study", job.study, "--home", str(home), "--json"]


@dataclass
class Running:
    """A search's process, or None where one of an earlier service still holds the study."""

    process: subprocess.Popen[bytes] | None


class Supervisor:
    """`at_once` searches run beside each other, each with `threads` threads; one that crashes is started again `most_restarts`
    times, after `backoff_s`, twice that, and so on. `environment` is added to the searches' own."""

    def __init__(
        self,
        queue: Queue,
        *,
        at_once: int = 1,
        threads: int = 1,
        most_restarts: int = 3,
        backoff_s: float = 5.0,
        command: Command = search_command,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.queue, self.at_once, self.threads = queue, at_once, threads
        self.most_restarts, self.backoff_s, self.command = most_restarts, backoff_s, command
        self.environment = dict(environment or {})
        self.running: dict[str, Running] = {}
        self._not_before: dict[str, float] = {}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take over what an earlier service left, then work in a thread of its own."""
        for job in self.queue.jobs():
            if job.state in LIVE:
                self._take_over(job)
        self._thread = threading.Thread(target=self._work, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self, patience_s: float = 60.0) -> None:
        """Ask all searches to rest, wait, end what does not; they are queued, so that the next service goes on with them."""
        self._ending.set()
        self.queue.changed.set()
        if self._thread is not None:
            self._thread.join(patience_s)
        deadline = time.monotonic() + patience_s
        for running in self.running.values():
            _signal(running.process, signal.SIGINT)
        for study, running in list(self.running.items()):
            if running.process is None:
                continue
            try:
                running.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(running.process, signal.SIGKILL)
                running.process.wait(10)
            self._ended(study, running.process.returncode)

    def log_file(self, study: str) -> Path:
        return self.queue.folder / "logs" / f"{study}.log"

    def _work(self) -> None:
        while not self._ending.is_set():
            self.queue.changed.clear()
            self.step()
            self.queue.changed.wait(EVERY_S if self.running or self._not_before else 2.0)

    def step(self) -> None:
        """Look once at what runs and what waits."""
        for study, running in list(self.running.items()):
            code = self._look(study, running)
            if code is not None:
                self._ended(study, code)
        self._pass_on_words()
        while len(self.running) < self.at_once:
            job = self._next()
            if job is None:
                return
            self._begin(job)

    def _look(self, study: str, running: Running) -> int | None:
        """The exit code of a search that has ended; of one that was taken over it is not known and counts as a crash."""
        if running.process is None:
            return None if is_taken(self._folder(study)) else UNSEEN
        log = self.log_file(study)
        with contextlib.suppress(OSError):
            if log.stat().st_size > MOST_LOG_BYTES:
                os.truncate(log, 0)
        return running.process.poll()

    def _pass_on_words(self) -> None:
        """Words that came while a search was only starting."""
        for study in self.running:
            job = self.queue.job(study)
            verb = None if job is None else WORDS.get(job.state)
            folder = self._folder(study)
            begun = (
                is_taken(folder) and study_state(folder) == "running"
            )  # before, it would take the word for an old one
            if verb is not None and begun and ordered(folder) != verb:
                with contextlib.suppress(ParetuneError):
                    order(folder, verb)

    def _next(self) -> Job | None:
        moment = time.monotonic()
        waiting = (job for job in self.queue.jobs() if job.state == "queued")
        return next((job for job in waiting if self._not_before.get(job.study, 0.0) <= moment), None)

    def _begin(self, job: Job) -> None:
        self._not_before.pop(job.study, None)
        if is_taken(self._folder(job.study)):  # a search of the command line has gone on with it
            self.running[job.study] = Running(None)
            self.queue.put(job.study, "running", started=now())
            return
        log = self.log_file(job.study)
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        rest = self.command(job, self.queue.spec_file(job.study), self.queue.home)
        threads = str(self.threads)
        environment = {
            **{name: value for name, value in os.environ.items() if name != TOKEN},
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            **self.environment,
        }
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "paretune.service.launcher", str(os.getpid()), "--", *rest],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=environment,
                cwd=self.queue.home,
                start_new_session=True,
            )
        self.running[job.study] = Running(process)
        self.queue.put(job.study, "running", started=now(), ended="", reason="")

    def _ended(self, study: str, code: int) -> None:
        """Write how a search ended; one that crashed waits and is started again, a few times."""
        del self.running[study]
        job, state = self.queue.job(study), study_state(self._folder(study))
        assert job is not None
        if code in FINAL:
            self._final(job, code, state)
        elif job.state in RESTED and (code == 130 or state == STATES_OF.get(RESTED[job.state])):
            self.queue.put(study, RESTED[job.state], reason="")
        elif code in (130, UNSEEN) and state in STATES_OF:
            self.queue.put(study, STATES_OF[state], reason="")
        elif self._ending.is_set():
            self.queue.put(study, "queued", reason="the service ended; the next one goes on")
        elif code == 130:
            self.queue.put(study, "paused", reason="interrupted by a signal")
        elif job.state in RESTED:  # it died on the way to where it was asked to go
            self._rest_dead(job)
        else:
            self._crashed(job, code)

    def _final(self, job: Job, code: int, state: str) -> None:
        if code in (0, 3):
            self.queue.put(
                job.study, "complete", reason="the budget ended before a student was confirmed" if code else ""
            )
        elif code == 4 and state == "complete":  # stopped before anything was confirmed
            self.queue.put(job.study, "complete", reason="nothing was confirmed")
        else:
            self.queue.put(job.study, "failed", reason=self._last_words(job.study) or f"exit code {code}")

    def _rest_dead(self, job: Job) -> None:
        verb, folder = WORDS[job.state], self._folder(job.study)
        if verb != "pause" and (folder / "study.db").is_file():
            with contextlib.suppress(ParetuneError):
                order(folder, verb)
        self.queue.put(job.study, RESTED[job.state], reason="the process had died")

    def _crashed(self, job: Job, code: int) -> None:
        attempts = job.attempts + 1
        how = f"signal {-code}" if code < UNSEEN else f"exit code {code}" if code >= 0 else "with its service"
        if attempts > self.most_restarts:
            reason = f"the search died {attempts} times, the last time by {how}: {self._last_words(job.study)}"
            self.queue.put(job.study, "failed", attempts=attempts, reason=reason[:TOLD_BYTES])
            return
        self._not_before[job.study] = time.monotonic() + self.backoff_s * 2 ** (attempts - 1)
        self.queue.put(job.study, "queued", attempts=attempts, reason=f"died by {how}; it is started again")

    def _take_over(self, job: Job) -> None:
        """A search that the service before this one had started: still alive, at rest, or dead."""
        folder = self._folder(job.study)
        if is_taken(folder):
            self.running[job.study] = Running(None)
            return
        state = study_state(folder)
        if state in STATES_OF:
            self.queue.put(job.study, STATES_OF[state], reason="")
        elif job.state in RESTED:
            self._rest_dead(job)
        else:
            self.queue.put(job.study, "queued", reason="the service had ended; it goes on")

    def _last_words(self, study: str) -> str:
        """The end of a search's log without what only a terminal reads."""
        with contextlib.suppress(OSError):
            with self.log_file(study).open("rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - TOLD_BYTES))
                lines = stream.read().decode("utf8", "replace").splitlines()
            told = [line for line in lines if line.startswith(("error:", "remedy:"))] or lines[-3:]
            return " ".join(told)[-TOLD_BYTES:]
        return ""

    def _folder(self, study: str) -> Path:
        return self.queue.home / "studies" / study


def _signal(process: subprocess.Popen[bytes] | None, number: int) -> None:
    """SIGINT goes to the search, which ends its own children in good order; SIGKILL to all that it has started."""
    if process is None or process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
