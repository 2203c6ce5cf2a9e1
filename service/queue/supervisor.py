"""One operating-system process per search: started from the queue, watched, started again after a crash, asked to rest at the end.

A crash of a search costs the service nothing, and a crash of the service costs a search at most what was running: its process is
asked to end (launcher.py), and the next service finds it in the queue. No error ends the supervisor's thread: it is told
(`condition`), and the same is tried again. What the machine lacks, such as disk, holds the queue (hold.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from paretune.common.errors import ParetuneError, Shortage
from paretune.common.files import disk_problem
from paretune.search.execution import ending
from paretune.search.study.control import order, ordered
from paretune.search.study.database import is_taken
from paretune.search.study.records import now
from paretune.service.queue.hold import Condition, Hold
from paretune.service.queue.job import LIVE, Job
from paretune.service.queue.logs import MOST_LOG_BYTES, SearchLog
from paretune.service.queue.outcomes import UNSEEN, WORDS, Ended, outcome_of, study_says
from paretune.service.queue.queue import Queue

TOKEN = "PARETUNE_TOKEN"
EVERY_S, IDLE_S = 0.25, 2.0
STUCK_S = 120.0  # without a turn; the database's own patience is 20 s
LONGEST_BACKOFF_S = 60.0
END_MARGIN_S = 15.0
Command = Callable[[Job, Path, Path], list[str]]


def search_command(job: Job, spec: Path, home: Path) -> list[str]:
    """The arguments of Python for a job's search."""
    return ["-m", "paretune", "search", str(spec), "--study", job.study, "--home", str(home), "--json"]


@dataclass
class Running:
    """A search's process and the file in memory into which it writes how it ends; None where one of an earlier service still
    holds the study. `end` is what was known when it had ended: the disk may be free again before that can be written."""

    process: subprocess.Popen[bytes] | None
    told: int | None = None
    end: Ended | None = None

    def close(self) -> None:
        """Close the file in memory, if it is still open."""
        if self.told is not None:
            os.close(self.told)
            self.told = None


class Supervisor:
    """`at_once` searches run beside each other, each with `threads` threads; one that crashes is started again `most_restarts`
    times, after `backoff_s`, twice that, and so on. `environment` is added to the searches' own; `hold_s` is the first pause after
    a search has found that the machine lacks something."""

    def __init__(
        self,
        queue: Queue,
        *,
        at_once: int = 1,
        threads: int = 1,
        most_restarts: int = 3,
        backoff_s: float = 5.0,
        hold_s: float = 15.0,
        command: Command = search_command,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.queue, self.at_once, self.threads = queue, at_once, threads
        self.most_restarts, self.backoff_s, self.command = most_restarts, backoff_s, command
        self.environment = dict(environment or {})
        self.running: dict[str, Running] = {}
        self.hold = Hold(queue.folder, hold_s)
        self._not_before: dict[str, float] = {}
        self._ending = threading.Event()
        self._patience_s = 60.0
        self._thread: threading.Thread | None = None
        self._trouble: Exception | None = None
        self._failures = 0
        self._turn = time.monotonic()

    def start(self) -> None:
        """Work in a thread of its own; what an earlier service left is taken over first."""
        self.queue.watch = self.condition
        self._thread = threading.Thread(target=self._work, name="supervisor", daemon=True)
        self._thread.start()

    def stop(self, patience_s: float = 60.0) -> None:
        """Ask all searches to rest, wait, end what does not; they are queued, so that the next service goes on with them."""
        self._patience_s = patience_s
        self._ending.set()
        self.queue.changed.set()
        if self._thread is None:
            self._rest_all()
        else:  # the kernel signals a search when the thread that has started it ends: so the thread itself ends them, once
            self._thread.join(patience_s + END_MARGIN_S)

    def condition(self) -> Condition:
        """Whether searches are started just now, and why not."""
        if self._ending.is_set():
            return Condition("stopped", "the service ends")
        if self._thread is None or not self._thread.is_alive():
            return Condition("stopped", "the thread that starts searches has ended; start the service again")
        silent = time.monotonic() - self._turn
        if silent > STUCK_S:
            return Condition("failing", f"nothing has been started or ended for {silent:.0f} s")
        trouble = self._trouble
        if isinstance(trouble, Shortage):
            return Condition("held", self.hold.reason or trouble.problem.partition(";")[0].partition(": ")[0])
        if trouble is not None:
            return Condition(
                "failing", f"{type(trouble).__name__}, {self._failures} times; see the service's own output"
            )
        return Condition("held", self.hold.reason) if self.hold.reason else Condition()

    def log_of(self, study: str) -> SearchLog:
        """Return the log of the study's search."""
        return SearchLog(self.log_file(study))

    def log_file(self, study: str) -> Path:
        """Return the path of the log of the study's search."""
        return self.queue.folder / "logs" / f"{study}.log"

    def _work(self) -> None:
        while not self._ending.is_set():
            self.queue.changed.clear()
            self.turn()
            self._turn = time.monotonic()
            if self._trouble is not None:
                longest = IDLE_S if isinstance(self._trouble, Shortage) else LONGEST_BACKOFF_S
                self._ending.wait(min(longest, EVERY_S * 2 ** min(self._failures, 10)))
            else:
                self.queue.changed.wait(EVERY_S if self.running or self._not_before else IDLE_S)
        self._rest_all()

    def turn(self) -> None:
        """One `step`, whatever happens in it."""
        try:
            self.step()
        except Exception as error:
            trouble = (disk_problem(error) if isinstance(error, OSError) else None) or error
            self._failures += 1
            if type(trouble) is not type(self._trouble):
                with contextlib.suppress(OSError):
                    traceback.print_exc()
            self._trouble = trouble
        else:
            self._trouble, self._failures = None, 0

    def step(self) -> None:
        """Look once at what runs and what waits. What fails for one search holds up no other; the first error is raised at the end."""
        problems: list[Exception] = []

        def tried(do: Callable[[], object]) -> None:
            try:
                do()
            except Exception as error:
                problems.append(error)

        tried(self._take_over_all)
        for study, running in list(self.running.items()):
            tried(lambda study=study, running=running: self._look(study, running))  # type: ignore[misc]
        for study in list(self.running):
            tried(lambda study=study: self._pass_on_word(study))  # type: ignore[misc]
        tried(self._fill)
        if problems:
            raise problems[0]

    def _fill(self) -> None:
        """Begin what waits while there is room. A search that has crashed keeps its place until it is tried again: what waits behind
        it may run for a night."""
        while len(self.running) < self.at_once:
            job = self._next()
            if job is None or self.hold.is_on():
                return
            self._begin(job)

    def _look(self, study: str, running: Running) -> None:
        """Write how a search has ended, if it has; of one that was taken over the exit code is not known."""
        if running.process is None:
            code = None if is_taken(self._folder(study)) else UNSEEN
        else:
            self.log_of(study).trim(MOST_LOG_BYTES)
            code = running.process.poll()
        if code is not None:
            self._ended(study, code)

    def _pass_on_word(self, study: str) -> None:
        """A word that came while the search was only starting; before it runs it would take the word for an old one."""
        job, folder = self.queue.job(study), self._folder(study)
        verb = None if job is None else WORDS.get(job.state)
        if verb is not None and is_taken(folder) and study_says(folder).state == "running" and ordered(folder) != verb:
            with contextlib.suppress(ParetuneError):
                order(folder, verb)

    def _next(self) -> Job | None:
        moment = time.monotonic()
        self._not_before = {study: at for study, at in self._not_before.items() if at > moment}
        waiting = [job for job in self.queue.jobs() if job.state == "queued" and job.study not in self.running]
        kept = sum(job.study in self._not_before for job in waiting)
        if len(self.running) + kept >= self.at_once:
            return None
        return next((job for job in waiting if job.study not in self._not_before), None)

    def _begin(self, job: Job) -> None:
        refusal = self.queue.refusal(job)
        if refusal:
            self.queue.put(job.study, "failed", reason=refusal)
            return
        if is_taken(self._folder(job.study)):  # a search of the command line has gone on with it
            self.queue.put(job.study, "running", started=now())
            self.running[job.study] = Running(None)
            return
        self.queue.put(job.study, "running", started=now(), ended="", reason="")
        try:
            self.running[job.study] = self._start_process(job)
        except BaseException:
            self.queue.put(job.study, "queued", started=job.started, reason=job.reason)
            raise

    def _start_process(self, job: Job) -> Running:
        log = self.log_file(job.study)
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        rest = self.command(job, self.queue.spec_file(job.study), self.queue.home)
        told = os.memfd_create(f"ending of {job.study}")
        try:
            with log.open("ab") as stream:
                process = subprocess.Popen(
                    [sys.executable, "-m", "paretune.service.queue.launcher", str(os.getpid()), "--", *rest],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    env=self._environment(told),
                    cwd=self.queue.home,
                    start_new_session=True,
                    pass_fds=(told,),
                )
        except BaseException:
            os.close(told)
            raise
        return Running(process, told)

    def _environment(self, told: int) -> dict[str, str]:
        threads = str(self.threads)
        return {
            **{name: value for name, value in os.environ.items() if name != TOKEN},
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OMP_WAIT_POLICY": "PASSIVE",
            **self.environment,
            ending.VARIABLE: str(told),
        }

    def _ended(self, study: str, code: int) -> None:
        """Write how a search ended. It counts as running until that is written: a full disk must not lose it."""
        running, job = self.running[study], self.queue.job(study)
        if job is not None:
            running.end = running.end or self._end_of(study, running, code)
            self._write_end(job, running.end)
        running.close()
        del self.running[study]

    def _end_of(self, study: str, running: Running, code: int) -> Ended:
        return Ended(
            code,
            study_says(self._folder(study)),
            None if running.told is None else ending.read(running.told),
            self.log_of(study).words(),
            self.hold.lack() if code else "",
            self._ending.is_set(),
        )

    def _write_end(self, job: Job, end: Ended) -> None:
        found = outcome_of(job, end, self.most_restarts)
        if found.order is not None:
            with contextlib.suppress(ParetuneError):
                order(self._folder(job.study), found.order)
        self.queue.put(job.study, found.state, attempts=job.attempts + found.crashed, reason=found.reason)
        if found.shortage:
            self.hold.begin(found.shortage)
        elif end.code in (0, 3):
            self.hold.forget()
        if found.crashed and found.state == "queued":
            self._not_before[job.study] = time.monotonic() + self.backoff_s * 2**job.attempts

    def _take_over_all(self) -> None:
        """Jobs that should run but are nobody's: an earlier service had started them, or an error came between."""
        for job in self.queue.jobs():
            if job.state in LIVE and job.study not in self.running:
                self._take_over(job)

    def _take_over(self, job: Job) -> None:
        """A search that the service before this one had started: still alive, at rest, or dead. It keeps its place in the queue."""
        folder = self._folder(job.study)
        if is_taken(folder):
            self.running[job.study] = Running(None)
            return
        self._write_end(job, Ended(UNSEEN, study_says(folder)))

    def _rest_all(self) -> None:
        """Ask everything that runs to end in good order; end what does not within the patience."""
        deadline = time.monotonic() + self._patience_s
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
            with contextlib.suppress(Exception):  # the next service sees from the study how it stands
                self._ended(study, running.process.returncode)

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
