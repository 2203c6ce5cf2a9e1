"""The container's documented command answers under a published port, imitated in a network namespace; and who starts and writes what."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from paretune.cli import app as cli
from paretune.common.agent_access import allowed_names, host_is_known, host_problem, url_to_open
from paretune.common.errors import UsageError
from paretune.service.queue.job import Conflict
from paretune.service.queue.queue import Queue
from paretune.service.server.serve import bind

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TOKEN = "t" * 32
PROGRAM = """
import json, subprocess, sys, time, urllib.request, urllib.error
home, command, health, other = json.loads(sys.argv[1])
run = lambda *words: subprocess.run(words, check=True)
run("ip", "link", "set", "lo", "up")
run("ip", "addr", "add", "172.17.0.2/32", "dev", "lo")
run("hostname", "container")
run("mount", "--bind", home + "/hosts", "/etc/hosts")
paretune = [sys.executable, "-m", "paretune"]

def ask(host):
    request = urllib.request.Request("http://172.17.0.2:8765/v1/health", headers={"Host": host})
    try:
        return urllib.request.urlopen(request, timeout=20).status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()

def serve(arguments, hosts):
    service = subprocess.Popen([*paretune, *arguments, "--searches", "0", "--home", home + "/runs"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed = service.stdout.readline().strip()
        found = {host: ask(host) for host in hosts} if printed else {}
        link = urllib.request.urlopen(printed + "/v1/health", timeout=20).status if printed else 0
        healthy = subprocess.run([sys.executable, *health[1:]], capture_output=True, text=True)
    finally:
        service.terminate()
        words = service.communicate(timeout=240)[1]
    return {"printed": printed, "link": link, "hosts": found, "health": healthy.returncode,
            "why": healthy.stderr, "words": words}

hosts = ["localhost:8765", "127.0.0.1:8765", "localhost:9000", "127.0.0.1:80", "localhost", "172.17.0.2:8765", "evil.test:8765"]
print(json.dumps([serve(command, hosts), serve(other, hosts)]))
"""


def words_of(instruction: str) -> list[str]:
    found = re.findall(rf"^\s*{instruction} (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)
    return [word for line in found for word in json.loads(line)]


def test_the_documented_container_answers(tmp_path: Path) -> None:
    """As behind `docker run -p`: the connection comes to the container's address, the Host is what the browser's line shows."""
    isolated = ["unshare", "--net", "--mount", "--uts"]
    if os.geteuid() != 0 or subprocess.run([*isolated, "ip", "link"], capture_output=True).returncode:
        pytest.skip("this machine lets us make no network namespace")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n172.17.0.2 container\n")
    health, command = words_of("CMD")[:3], words_of("CMD")[3:]
    assert health[0] == "python" and command[0] == "serve"
    asked = json.dumps([str(tmp_path), command, health, ["serve", "--host", "0.0.0.0"]])
    done = subprocess.run(
        [*isolated, sys.executable, "-c", textwrap.dedent(PROGRAM), asked],
        env={**os.environ, "PARETUNE_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    documented, other = json.loads(done.stdout)
    codes = {host: code for host, (code, _) in documented["hosts"].items()}
    assert codes.pop("evil.test:8765") == 403 and set(codes.values()) == {200}, codes
    assert documented["printed"] == "http://127.0.0.1:8765" and documented["link"] == 200
    assert "0.0.0.0" not in documented["words"]
    assert documented["health"] == 0, documented["why"]
    code, told = other["hosts"]["localhost:9000"]
    assert code == 403 and "localhost:9000" in told and "--allow-host localhost" in told
    assert other["health"] == 1 and "403" in other["why"], "not green where nobody from outside is answered"


# names


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("models.example.org", True),
        ("models.example.org:1", True),
        ("MODELS.example.org:65535", True),
        ("fixed.example.org:8443", True),
        ("fixed.example.org", False),
        ("fixed.example.org:8444", False),
        ("[2001:db8::1]:9", True),
        ("models.example.org:", False),
        ("models.example.org:x", False),
        ("models.example.org.", False),
        ("models.example.org:80.evil.test", False),
        ("evil.test", False),
        ("", False),
        (None, False),
    ],
)
def test_a_name_without_a_port_is_allowed_with_any(host: str | None, known: bool) -> None:
    names = allowed_names(["models.example.org", "Fixed.example.org:8443", "2001:db8::1"])
    assert host_is_known(host, "192.0.2.1", 8765, names) == known


def test_own_addresses_as_clients_write_them() -> None:
    assert host_is_known("[::1]:8765", "::1", 8765) and host_is_known("localhost:8765", "::1", 8765)
    assert host_is_known("127.0.0.1:8765", "::ffff:127.0.0.1", 8765)
    assert host_is_known("[fe80::1]:8765", "fe80::1%eth0", 8765)
    assert host_is_known("127.0.0.1", "127.0.0.1", 80) and not host_is_known("127.0.0.1", "127.0.0.1", 8765)
    assert not host_is_known("0.0.0.0:8765", "127.0.0.1", 8765)


@pytest.mark.parametrize("name", ["", "https://x", "x/y", "a b", "*", "x:0", "x:99999", "x:y", "x\ny", "user@x"])
def test_what_can_be_no_host_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--allow-host"):
        allowed_names([name])


def test_a_refusal_names_the_host_and_the_remedy() -> None:
    assert "'board:1'" in host_problem("board:1", "start with --allow-host")[0]
    assert "--allow-host board " in host_problem("board:1", "start with --allow-host")[1]
    assert "[::1]" in host_problem("[::1]:8765", "start with --allow-host")[1]
    assert "NAME" in host_problem("$(reboot):1", "start with --allow-host")[1]
    assert "Host header" in host_problem(None, "")[1]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
        ("", "http://127.0.0.1:1"),
        ("fd00::1", "http://[fd00::1]:1"),
    ],
)
def test_the_printed_address_can_be_opened(host: str, url: str) -> None:
    assert url_to_open(host, 1) == url


# what a start that fails leaves behind


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    monkeypatch.delenv("PARETUNE_TOKEN", raising=False)
    monkeypatch.delenv("PARETUNE_AGENT_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["paretune", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), capfd.readouterr().err


@pytest.fixture
def taken() -> Any:
    listening = bind("127.0.0.1", 0)
    yield listening.getsockname()[1]
    listening.close()


@pytest.mark.parametrize("command", ["serve", "agent"])
def test_a_port_that_is_taken_costs_no_token(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, taken: int, command: str
) -> None:
    file = tmp_path / ("service" if command == "serve" else "agent") / "token"
    code, words = run(monkeypatch, capfd, command, "--port", taken, "--home", tmp_path)
    assert code == 5 and "--port" in words and not file.exists()
    file.write_text(TOKEN)
    file.chmod(0o600)
    if command == "serve":
        assert run(monkeypatch, capfd, command, "--port", taken, "--home", tmp_path, "--new-token")[0] == 5
    assert file.read_text() == TOKEN


def test_a_second_service_is_told_so_and_changes_no_token(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    queue = Queue(tmp_path)
    (tmp_path / "service" / "token").write_text(TOKEN)
    (tmp_path / "service" / "token").chmod(0o600)
    for more in ([], ["--new-token"]):
        code, words = run(monkeypatch, capfd, "serve", "--port", 0, "--home", tmp_path, *more)
        assert code == 5 and "another service runs on" in words and "a search is running" not in words
        assert f"pid {os.getpid()}" in words and (tmp_path / "service" / "token").read_text() == TOKEN
    queue.close()


@pytest.mark.parametrize("command", [["serve"], ["agent"], ["agent", "--new-token"]])
@pytest.mark.parametrize("inside", [False, True])
def test_a_home_that_is_a_file_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, command: list[str], inside: bool
) -> None:
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home" if inside else tmp_path / "file"
    code, words = run(monkeypatch, capfd, *command, "--home", home)
    assert code == 5 and "must be a folder" in words and "bug" not in words


def test_a_key_that_comes_with_another_name_is_said_so(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.submit({"seed": 1}, "key", "first")
    with pytest.raises(Conflict, match="not under the name 'second'"):
        queue.submit({"seed": 1}, "key", "second")
    with pytest.raises(Conflict, match="with other settings"):
        queue.submit({"seed": 2}, "key", "first")
    queue.close()
