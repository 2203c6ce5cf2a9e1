"""A disk that is really full: a small tmpfs. Answers say so, nothing is called damaged, the queue waits and goes on."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from paretune.common.errors import DiskProblem
from paretune.common.files import disk_lack, free_bytes
from paretune.search.study.database_errors import told
from paretune.search.study.store import Store
from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.queue.supervisor import Supervisor
from paretune.service.server.app import create_app
from paretune.service.state import Service
from support.waiting import wait

KEY = "t" * 32
SPEC = {"budget": "5m"}


def mounted(place: Path, options: str) -> Path:
    """A tmpfs, or a visible skip."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    return place


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = mounted(tmp_path / "disk", "size=24m")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def home(disk: Path, simulated_home: Path) -> Path:
    shutil.copytree(simulated_home, disk / "home", ignore=shutil.ignore_patterns("artifacts", "work"))
    return disk / "home"


@pytest.fixture
def queue(home: Path) -> Iterator[Queue]:
    found = Queue(home)
    yield found
    found.close()


@pytest.fixture
def client(queue: Queue) -> TestClient:
    service = Service(queue.home, Studies(queue.home), queue, KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    return TestClient(
        create_app(service), base_url="http://127.0.0.1:8765", headers=headers, raise_server_exceptions=False
    )


def fill(home: Path) -> Path:
    """Fill the disk to its last byte; the file to remove."""
    ballast = home.parent / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    assert free_bytes(home) == 0 and disk_lack(home) is not None
    return ballast


def test_what_writes_is_refused_in_words_and_what_reads_goes_on(home: Path, queue: Queue, client: TestClient) -> None:
    waiting, resting = queue.submit(SPEC)[0].study, queue.submit(SPEC)[0].study
    queue.pause(resting)
    before = client.get("/v1/queue").json()
    ballast = fill(home)
    for path, body in (
        ("/v1/studies", {"spec": SPEC}),
        (f"/v1/studies/{waiting}/pause", {}),
        (f"/v1/studies/{waiting}/cancel", {}),
        (f"/v1/studies/{resting}/resume", {}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 503 and answer.headers["content-type"] == "application/json", (path, answer.text)
        assert (
            "disk is full" in answer.json()["error"] and "damaged" not in answer.text and "backup" not in answer.text
        ), path
    for path in (
        "/",
        "/studies/nightly",
        "/v1/studies/nightly",
        "/v1/studies/nightly/front",
        "/v1/studies",
        "/v1/queue",
        "/v1/health",
    ):
        answer = client.get(path)
        assert answer.status_code == 200 and "damaged" not in answer.text, (path, answer.text[:500])
    assert client.get("/v1/queue").json() == before, "nothing was half done"
    ballast.unlink()
    assert client.post("/v1/studies", json={"spec": SPEC}).status_code == 201
    assert client.post(f"/v1/studies/{resting}/resume", json={}).status_code == 200


def test_a_study_on_a_full_disk_is_whole(home: Path) -> None:
    folder = home / "studies" / "nightly"
    store = Store.open_study(folder)
    ballast = fill(home)
    with pytest.raises(DiskProblem, match="disk is full") as caught, told(folder, "the study database"):
        for i in range(1000):
            store.event("note", f"{i}" * 2000)
    assert "backup" not in caught.value.remedy
    store.close()
    ballast.unlink()
    with sqlite3.connect(folder / "study.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_the_queue_is_held_and_goes_on(home: Path, queue: Queue, client: TestClient) -> None:
    """The disk becomes full while a search runs, which ends with it; nothing is burnt, health says why."""
    text = """
        import pathlib, sys, time
        home = pathlib.Path(sys.argv[2])
        (home.parent / "up").touch()
        while not (home.parent / "full").exists() and not (home.parent / "freed").exists(): time.sleep(0.02)
        sys.exit(0 if (home.parent / "freed").exists() else 1)
    """
    supervisor = Supervisor(
        queue,
        backoff_s=0.05,
        hold_s=0.3,
        command=lambda job, spec, home: ["-c", textwrap.dedent(text), job.study, str(home)],
    )
    studies = [queue.submit(SPEC)[0].study for _ in range(3)]
    supervisor.start()
    try:
        wait((home.parent / "up").exists, what="the start")
        (home.parent / "not yet").touch()
        ballast = fill(home)
        (home.parent / "not yet").rename(home.parent / "full")  # the search ends now, as on a full disk
        told = wait(lambda: (h := client.get("/v1/health").json())["status"] == "held" and h, what="the hold")
        assert "disk is full" in told["problem"] and str(home) not in told["problem"]
        assert "Searches wait: the disk is full" in client.get("/").text
        time.sleep(1.0)
        assert {job.state for job in queue.jobs()} <= {"queued", "running"}
        (home.parent / "full").rename(home.parent / "freed")
        ballast.unlink()
        wait(lambda: all(job.state == "complete" for job in queue.jobs()), what="going on")
        assert [job.study for job in queue.jobs()] == studies and [job.attempts for job in queue.jobs()] == [0, 0, 0]
        wait(lambda: client.get("/v1/health").json()["status"] == "ok", what="health")
    finally:
        supervisor.stop(20)


def test_a_disk_without_inodes_is_full(tmp_path: Path) -> None:
    place = mounted(tmp_path / "disk", "size=8m,nr_inodes=12")
    try:
        for i in range(12):
            try:
                (place / str(i)).touch()
            except OSError:
                break
        lack = disk_lack(place)
        assert free_bytes(place) == 0 and lack is not None and os.strerror(lack.errno or 0) == "No space left on device"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
