"""Evening: submit. Morning: choose, export, run. With the service as its user starts it, and a real search at toy size."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paretune.search.study.store import Store
from support.commands import SHARES

pytestmark = pytest.mark.timeout(280)
SPEC = {
    "teacher": "tiny",
    "data": "text",
    "budget": "200s",
    "fit_points": 8,
    "finalists": 1,
    "max_candidates": 4,
    "shares": SHARES,  # all but max_candidates as in the fixture `night`, whose elastic student serves here too
}


class Service:
    """`paretune serve` as a process, and a client of it."""

    def __init__(self, home: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "paretune", "serve", "--port", "0", "--home", str(home), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PARETUNE_TOKEN"},
        )
        assert self.process.stdout is not None and self.process.stderr is not None
        self.address = self.process.stdout.readline().strip()
        self.told = self.process.stderr.readline() + self.process.stderr.readline()
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.token = (home / "service" / "token").read_text().strip()

    def ask(self, path: str, data: Any = None, **headers: str) -> tuple[int, Any]:
        host, _, port = self.address.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=240)
        known = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", **headers}
        body = None if data is None else json.dumps(data)
        connection.request("GET" if data is None else "POST", path, body, known)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(content) if is_json else content

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """Server-sent events until the stream ends."""
        host, _, port = self.address.removeprefix("http://").partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=240)
        connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
        name = ""
        for raw in connection.getresponse():
            line = raw.decode().rstrip("\n")
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                yield name, json.loads(line.removeprefix("data: "))
        connection.close()

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(240)


@pytest.fixture
def home(tmp_path: Path, tiny_teacher_dir: Path, tiny_text: Path, night: tuple[Path, Any]) -> Path:
    """What the operator has put there: a model and a text; and what a search with both has left in the cache."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    (home / "data").mkdir()
    shutil.copytree(tiny_teacher_dir, home / "models" / "tiny")
    shutil.copytree(night[0] / "mlruns" / "cache", home / "cache")
    copy = shutil.copytree if Path(tiny_text).is_dir() else shutil.copy
    copy(tiny_text, home / "data" / "text")
    return home


def elastic_file(home: Path) -> Path:
    (found,) = (home / "cache" / "elastic").glob("*.safetensors")
    return found


def test_evening_submit_morning_choose_export_run(home: Path, tmp_path: Path) -> None:
    trained, service = elastic_file(home).stat().st_mtime_ns, Service(home)
    try:
        assert re.search(r"/login#token=[\w-]{43}\n", service.told), "the token is shown once"
        assert (home / "service" / "token").stat().st_mode & 0o777 == 0o600
        # evening
        status, plan = service.ask("/v1/plan", {"spec": SPEC})
        assert status == 200 and plan["expected_finalists"] >= 1, plan
        status, job = service.ask("/v1/studies", {"spec": SPEC, "name": "night"}, **{"Idempotency-Key": "tonight"})
        assert status == 201, job
        assert service.ask("/v1/studies", {"spec": SPEC, "name": "night"}, **{"Idempotency-Key": "tonight"})[0] == 200
        seen = list(service.events("/v1/studies/night/events"))
        assert seen[-1][0] == "end" and len(seen) > 3, "progress came while it ran"
        status, told = service.ask("/v1/studies/night")
        log = (home / "service" / "logs" / "night.log").read_text()[-2000:]
        assert told["job"]["state"] == "complete" and told["state"] == "complete", (told["job"], log)
        store = Store.reader(home / "studies" / "night")
        assert "elastic student taken from an earlier search" in [event.text for event in store.events()]
        store.close()
        assert elastic_file(home).stat().st_mtime_ns == trained
        # morning
        status, advice = service.ask("/v1/studies/night/recommendation?goal=fastest")
        assert status == 200 and advice["feasible"]
        key = advice["chosen"]["key"]
        status, page = service.ask(f"/studies/night/candidates/{key}")
        assert status == 200 and advice["chosen"]["description"].encode() in page
        delivered = tmp_path / "delivered"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "paretune",
                "recommend",
                "night",
                "--goal",
                "fastest",
                "--export",
                str(delivered),
                "--home",
                str(home),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        status, artifact = service.ask(advice["artifact"])
        for file in artifact["files"]:
            content = service.ask(f"/v1/artifacts/{file['sha256']}")[1]
            if isinstance(content, bytes):
                assert content == (delivered / file["name"]).read_bytes(), "HTTP delivers what the command does"
        guide = (delivered / "HOW_TO_RUN.md").read_text()
        code = re.search(r"```python\n(.*?)```", guide, flags=re.DOTALL)
        assert code is not None
        run = subprocess.run(
            [sys.executable, "-c", code[1]], cwd=delivered, capture_output=True, text=True, timeout=120, check=False
        )
        assert run.returncode == 0 and len(run.stdout) > 10, run.stderr[-1000:]
    finally:
        code_of_end = service.end()
    assert code_of_end == 0


def test_a_second_service_an_open_host_and_a_taken_port_are_refused(tmp_path: Path) -> None:
    def refused(*options: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "paretune", "serve", *options],
            capture_output=True,
            text=True,
            timeout=240,
            env={name: value for name, value in os.environ.items() if name != "PARETUNE_TOKEN"},
            check=False,
        )
        return done.returncode, done.stderr

    home = tmp_path / "home"
    code, told = refused("--host", "0.0.0.0", "--home", str(home))
    assert code == 2 and "needs a token of yours" in told and not (home / "service" / "token").exists()
    service = Service(home, "--searches", "0")
    try:
        port = service.address.rpartition(":")[2]
        assert refused("--port", port, "--home", str(tmp_path / "other"))[0] == 5
        code, told = refused("--port", "0", "--home", str(home))
        assert code == 5 and "another service runs" in told
        assert service.ask("/v1/health")[1]["status"] == "ok"
        (home / "service" / "token").chmod(0o644)
        code, told = refused("--port", "0", "--home", str(home))
        assert code == 5 and "chmod 600" in told
    finally:
        assert service.end() == 0
    assert refused("--host", "no host", "--home", str(tmp_path / "other"))[0] == 2
    assert refused("--allow-host", "https://x", "--home", str(tmp_path / "other"))[0] == 2
