"""The service while a disk fills, MLflow is killed and a search is killed: every answer is judged, and the queue at the end.

The home lies on a tmpfs of its own, which needs root. Searches are the simulated evaluator's; store, Ray, Optuna and MLflow are real.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import Figure, figure
from benchmarks.service import LONG, SIMULATED, Served, large_study, served

RATE, SECONDS = 50.0, float(os.environ.get("FAULTS_SECONDS", "600"))
# When each fault happens, as shares of the run, and how long its answers may take to be as before.
FULL, FREED, MLFLOW, SEARCH = 0.2, 0.35, 0.5, 0.65
SETTLES_S = 5.0
MLFLOW_STARTS_S = 40.0
SUBMIT_EVERY_S = 5.0


@dataclass
class Answers:
    """What came back. Wrong ones are kept in words; `accepted` are the searches that the service said it has, in order;
    `faults` those that really happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    full: tuple[float, float] = (0.0, 0.0)
    mlflow_away: tuple[float, float] = (0.0, 0.0)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, problem: str | None) -> None:
        with self.lock:
            self.counts[kind] += 1
            if problem is not None:
                self.wrong.append(problem)


def service_under_faults() -> Iterator[Figure]:
    """Wrong answers of the service in ten minutes at 50 requests a second, while its disk is filled and freed, MLflow is killed and the
    running search is killed. Right is what is true of the study, or 503 with the fault's name while the fault lasts."""
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk") as disk:
        home = disk / "home"
        home.mkdir()
        large_study(home, 1000)
        empty_mlflow(home)
        with served("--mlflow", home=home, **SIMULATED) as service:
            service.ask("/v1/studies", {"spec": LONG, "name": "running"})
            service.wait("running", lambda told: told.get("explored", 0) >= 3)
            found = under_faults(service)
            jobs = json.loads(service.ask("/v1/queue")[1])
            told = json.loads(service.ask("/v1/studies/running")[1])
    waiting = [job["study"] for job in jobs if job["state"] == "queued"]
    running = next(job for job in jobs if job["study"] == "running")
    for problem in found.wrong[:20]:
        print(problem, file=sys.stderr)
    yield figure(
        "service_under_faults",
        len(found.wrong),
        "wrong answers",
        answers=sum(found.counts.values()),
        by_kind=dict(found.counts),
        queue_as_before=waiting == found.accepted and running["state"] in ("running", "starting"),
        waiting=len(waiting),
        accepted=len(found.accepted),
        running=running["state"],
        others=[
            [job["study"], job["state"], job.get("reason", "")]
            for job in jobs
            if job["state"] != "queued" and job is not running
        ],
        explored=told["explored"],
        faults=found.faults,
    )


def under_faults(service: Served) -> Answers:
    """Ask for SECONDS while the faults happen."""
    answers, front = Answers(), service.ask("/v1/studies/large/front")[1]
    paths = {
        "/v1/studies": None,
        "/v1/studies/large/front": front,
        "/v1/studies/large": None,
        "/v1/studies/running": None,
        "/v1/queue": None,
        "/v1/health": None,
        "/studies/large": None,
        "/studies/running": None,
        "/": None,
        "/mlflow/version": None,
    }
    start, turn = time.monotonic() + 0.5, itertools.cycle(paths)
    faults = threading.Thread(target=make_faults, args=(service, answers, start))
    submitting = threading.Thread(target=submit, args=(service, answers, start + SECONDS))

    def one(due: float, path: str) -> None:
        time.sleep(max(0.0, due - time.monotonic()))
        asked = time.monotonic()
        try:
            status, body = service.ask(path)
        except (OSError, http.client.HTTPException) as error:
            answers.add(f"{path} {type(error).__name__}", f"{asked - start:.1f} s {path}: {error!r}")
            return
        problem = judge(answers, path, status, body, paths[path], asked)
        answers.add(f"{path} {status}", None if problem is None else f"{asked - start:.1f} s {path}: {problem}")

    faults.start()
    submitting.start()
    with ThreadPoolExecutor(32) as pool:
        for job in [pool.submit(one, start + i / RATE, next(turn)) for i in range(int(RATE * SECONDS))]:
            job.result()
    faults.join()
    submitting.join()
    return answers


def judge(answers: Answers, path: str, status: int, body: bytes, right: bytes | None, asked: float) -> str | None:
    """What is wrong with an answer, or None."""
    text = body.decode(errors="replace")
    if "damaged" in text or "backup" in text or "Traceback" in text:
        return f"{status} {text[:300]}"
    if status == 503:
        if path.startswith("/mlflow/"):
            return None if within(asked, answers.mlflow_away) else f"503 while MLflow is there: {text[:200]}"
        if "disk is full" in text:
            return None if within(asked, answers.full) else f"503 full while it is not: {text[:200]}"
    if status != 200:
        return f"{status} {text[:300]}"
    if right is not None and body != right:
        return f"another answer than before: {text[:200]}"
    if path.startswith("/v1/"):
        return _wrong_study(path, json.loads(text))
    if not path.startswith("/mlflow/") and "</html>" not in text:
        return f"half a page: {text[-100:]}"
    return None


def _wrong_study(path: str, answer: Any) -> str | None:
    """What is wrong with a JSON answer: a study of another name, or one that a fault has ended."""
    if path == "/v1/studies/running" and (
        answer["study"] != "running" or answer["state"] in ("failed", "cancelled", "complete")
    ):
        return f"{answer['study']} is {answer['state']}: {answer.get('job')}"
    return None if answer is not None else "null"


def within(moment: float, window: tuple[float, float]) -> bool:
    return window[0] > 0 and window[0] - SETTLES_S <= moment <= (window[1] or float("inf")) + SETTLES_S


def submit(service: Served, answers: Answers, end: float) -> None:
    """A search to queue every few seconds; what was refused is sent again with its key, as a careful client does."""
    for number in itertools.count():
        while time.monotonic() < end:
            asked = time.monotonic()
            status, body = service.ask(
                "/v1/studies", {"spec": {"seed": number}}, **{"Idempotency-Key": f"fault-{number}"}
            )
            full = status == 503 and b"disk is full" in body and within(asked, answers.full)
            right = status in (200, 201) or full
            answers.add(f"submit {status}", None if right else f"submit: {status} {body[:300]!r}")
            time.sleep(SUBMIT_EVERY_S)
            if status in (200, 201):
                answers.accepted.append(json.loads(body)["study"])
                break
        else:
            return


def make_faults(service: Served, answers: Answers, start: float) -> None:
    def at(share: float) -> None:
        time.sleep(max(0.0, start + share * SECONDS - time.monotonic()))

    at(FULL)
    answers.full = (time.monotonic(), 0.0)
    ballast = fill(service.home.parent)
    at(FREED)
    ballast.unlink()
    answers.full = (answers.full[0], time.monotonic())
    answers.faults.append("disk filled and freed")
    at(MLFLOW)
    answers.mlflow_away = (time.monotonic(), time.monotonic() + MLFLOW_STARTS_S)
    kill(service, "paretune.tracking.mlflow.app")
    answers.faults.append("MLflow killed")
    at(SEARCH)
    kill(service, "running")
    answers.faults.append("search killed")


def fill(disk: Path) -> Path:
    """Write until nothing more goes on the disk, and go on: what others free, a log that is cut, is taken again for a while."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    if os.statvfs(disk).f_bavail:
        sys.exit(f"{disk} did not fill")
    return ballast


def kill(service: Served, word: str) -> None:
    """SIGKILL to the one child of the service whose command line has this word."""
    listing = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(service.process.pid)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    ).stdout
    found = [int(line.split()[0]) for line in listing.splitlines() if word in line.split()]
    if len(found) != 1:
        sys.exit(f"no process {word!r} to kill among\n{listing}")
    os.kill(found[0], signal.SIGKILL)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        sys.exit(f"a tmpfs cannot be mounted here: {done.stderr.strip()}; run this benchmark as root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def empty_mlflow(home: Path) -> None:
    """MLflow's database as the first search makes it."""
    import mlflow

    from paretune.tracking.mlflow.paths import database_uri

    client: Any = mlflow.MlflowClient(database_uri(home))
    client.create_experiment("paretune", artifact_location=(home / "artifacts").as_uri())
