"""What an agent may use: disk and memory as its options say, and what is no size."""

from __future__ import annotations

import hashlib
import io
import sys
import time
from pathlib import Path

import pytest

from paretune.cli import app as cli
from paretune.hardware_profiles.detect import memory_bytes
from paretune.objectives.agent.jobs import LEAST_MEMORY_BYTES, Job, Jobs, default_memory_bytes
from paretune.objectives.agent.order import Order
from paretune.objectives.agent.store import ContentStore

ALLOCATES = """
import json, resource, subprocess, sys
request = json.loads(sys.stdin.read())
child = "import resource; print(resource.getrlimit(resource.RLIMIT_DATA)[0])"
inherited = int(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
from paretune.objectives.agent import job as agent_job

def measure(order, folder, kept):
    kept = bytearray(2_000_000_000)
    raise SystemExit("it was not refused")

agent_job.measure = measure
told = agent_job.answer(request)
print(json.dumps({**told, "remedy": str(inherited)}))
"""
OVER = "import sys; sys.stdin.read(); x = bytearray(2_000_000_000)"


DIGEST = hashlib.sha256(b"model").hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    found = ContentStore(tmp_path / "files", 10**6)
    found.put(DIGEST, io.BytesIO(b"model"), 5)
    return found


def ended(jobs: Jobs) -> Job:
    job = jobs.submit(Order("k", DIGEST, DIGEST, 1))
    deadline = time.monotonic() + 300
    while job.state in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return job


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits another process's memory")
@pytest.mark.parametrize("program", [ALLOCATES, OVER], ids=["in words", "a crash"])
def test_a_job_that_allocates_too_much_is_its_own_failure(tmp_path: Path, store: ContentStore, program: str) -> None:
    limit = 600 * 10**6
    jobs = Jobs(store, tmp_path / "agent", 60.0, (sys.executable, "-c", program), limit)
    try:
        job = ended(jobs)
        error = job.answer["error"]
        assert job.state == "failed"
        if program is ALLOCATES:
            assert error["kind"] == "infeasible" and "600 MB: --max-memory" in error["problem"]
            assert error["remedy"] == str(limit), "children of the job have the same limit"
        else:
            assert "MemoryError" in error["problem"]
        assert jobs.counts() == (False, 0), "the agent goes on"
    finally:
        jobs.close()


def test_the_default_leaves_room_for_two_engines() -> None:
    assert default_memory_bytes() == max(LEAST_MEMORY_BYTES, int(0.4 * memory_bytes()))


SIZES = ["0.05", "0", "-1GB", "-0", "nan", "inf", "1e999", "999999", "0.9MB", "1TBB", "GB", "", "one", "1e-3GB x"]


@pytest.mark.parametrize("option", ["--max-disk", "--max-memory"])
@pytest.mark.parametrize("size", SIZES)
def test_what_is_no_size_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, option: str, size: str
) -> None:
    code, words = run(monkeypatch, capfd, "agent", f"{option}={size}", "--home", str(tmp_path))
    assert code == 2 and option in words and not (tmp_path / "agent").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--searches=-1"],
        ["serve", "--searches=nan"],
        ["serve", "--threads=0"],
        ["serve", "--threads=1e9"],
        ["serve", "--port=65536"],
        ["serve", "--port=-1"],
        ["agent", "--port=65536"],
        ["agent", "--allow-host=https://board.lan"],
        ["serve", "--allow-host=https://board.lan"],
        ["serve", "--trusted-proxy=0.0.0.0/0"],
        ["serve", "--trusted-proxy=proxy.lan"],
    ],
    ids=" ".join,
)
def test_what_is_no_value_of_an_option_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, words: list[str]
) -> None:
    code, told = run(monkeypatch, capfd, *words, "--home", str(tmp_path))
    assert code == 2 and words[1].partition("=")[0] in told and not list(tmp_path.iterdir())


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["paretune", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capfd.readouterr().err
