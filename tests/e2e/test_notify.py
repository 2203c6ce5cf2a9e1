"""Notifications: a real https server with a certificate of its own, real programs, a search that is killed."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import http.server
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.service.notify import notify as module
from paretune.service.notify.notify import Notify, load_notify, post, run_command, tell
from paretune.service.notify.watch import TOLD

EVENT = {"study": "s", "event": "ended", "state": "complete", "exit_code": 0, "report": "/r"}


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """(certificate, key) of a name, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    today = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem, secret = folder / f"{name}.pem", folder / f"{name}.key"
    pem.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pem, secret


class Hook:
    """An https server on loopback that keeps what it is sent; `answers` are statuses in turn, the last one for ever."""

    def __init__(self, pem: Path, key: Path) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers, self.location, self.delay = [200], "", 0.0
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.got.append((dict(self.headers), body))
                time.sleep(hook.delay)
                status = hook.answers.pop(0) if len(hook.answers) > 1 else hook.answers[0]
                self.send_response(status)
                if hook.location:
                    self.send_header("Location", hook.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Silent."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"https://localhost:{self.server.server_address[1]}/hook?x=1"


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    pem, key = certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    found = Hook(pem, key)
    yield found
    found.server.shutdown()


def test_a_webhook_is_signed(hook: Hook) -> None:
    assert tell(Notify(url=hook.url, secret="secret", allow_private=True), EVENT) == []
    ((headers, body),) = hook.got
    assert json.loads(body) == EVENT
    at, _, digest = headers["X-Paretune-Signature"].removeprefix("t=").partition(",v1=")
    assert hmac.new(b"secret", f"{at}.".encode() + body, hashlib.sha256).hexdigest() == digest
    assert abs(int(at) - time.time()) < 60 and "secret" not in str(headers)


def test_the_own_network_is_refused_unless_it_is_meant(hook: Hook) -> None:
    (problem,) = tell(Notify(url=hook.url), EVENT)
    assert "not public" in problem and hook.got == []


def test_no_redirect_is_followed(hook: Hook) -> None:
    hook.answers, hook.location = [302], "https://localhost:1/elsewhere"
    (problem,) = tell(Notify(url=hook.url, allow_private=True), EVENT)
    assert "redirects (302)" in problem and len(hook.got) == 1


def test_one_that_is_down_for_a_moment_is_told_again(hook: Hook) -> None:
    hook.answers = [503, 500, 204]
    assert tell(Notify(url=hook.url, allow_private=True), EVENT) == []
    assert len(hook.got) == 3
    hook.answers = [500]
    (problem,) = tell(Notify(url=hook.url, allow_private=True), EVENT)
    assert "not taken in 3 tries" in problem and "500" in problem


def test_a_slow_receiver_is_given_up(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.2)
    monkeypatch.setattr(module, "TRIES", 1)
    hook.delay = 2.0
    (problem,) = tell(Notify(url=hook.url, allow_private=True), EVENT)
    assert "TimeoutError" in problem or "timed out" in problem


def test_the_servers_name_is_checked(hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pem, key = certificate(tmp_path, "another.test")
    other = Hook(pem, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    monkeypatch.setattr(module, "TRIES", 1)
    (problem,) = tell(Notify(url=other.url, allow_private=True), EVENT)
    assert "SSLCertVerificationError" in problem and other.got == []
    other.server.shutdown()


def test_the_connection_goes_to_the_address_that_was_checked(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: a name that is public when it is checked and loopback when it is used. It is resolved once only."""
    asked = []
    real = socket.getaddrinfo

    def resolve(host: str, *more: Any, **options: Any) -> Any:
        if host == "localhost":
            asked.append(host)
            return [(2, 1, 6, "", ("127.0.0.1", 1))]
        assert ipaddress.ip_address(host), "after that, addresses only"
        return real(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    post(hook.url, EVENT, None, allow_private=True)
    assert asked == ["localhost"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("2002:7f00:1::", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert module.is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "http://x.org",
        "ftp://x.org",
        "https://",
        "https://u:p@x.org",
        "https://x.org:0",
        "x",
        "https://x.org/a b",
        "https://[::1",
        "https://x.org:99999",
    ],
)
def test_addresses_that_cannot_be_are_refused_before_the_search(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="notify-url"):
        load_notify(tmp_path, url=url)


def test_options_come_before_the_environment_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "notify.yaml"
    file.write_text("command: from-file\nsecret: s\n")
    with pytest.raises(EnvironmentProblem, match="chmod 600"):
        load_notify(tmp_path)
    file.chmod(0o600)
    assert load_notify(tmp_path) == Notify(command="from-file", secret="s")
    monkeypatch.setenv("PARETUNE_NOTIFY_COMMAND", "from-environment")
    assert load_notify(tmp_path).command == "from-environment"
    assert load_notify(tmp_path, "option").command == "option"
    file.write_text("comand: x\n")
    with pytest.raises(UsageError, match="command"):
        load_notify(tmp_path)
    monkeypatch.setenv("PARETUNE_NOTIFY_COMMAND", "'")
    file.unlink()
    with pytest.raises(UsageError, match="split into words"):
        load_notify(tmp_path)
    assert not load_notify(tmp_path / "empty", "true").url


def test_a_command_gets_the_event_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETUNE_TOKEN", "secret")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "open(sys.argv[1], 'w').write(json.dumps([json.load(sys.stdin), dict(os.environ), sys.argv]))\n"
    )
    out = tmp_path / "out put; $(touch x)"
    assert run_command(f"{sys.executable} {script} '{out}'", EVENT) == []
    event, environment, arguments = json.loads(out.read_text())
    assert event == EVENT and environment["PARETUNE_STATE"] == "complete" and environment["PARETUNE_STUDY"] == "s"
    assert arguments[1] == str(out) and "PARETUNE_TOKEN" not in environment
    assert not (tmp_path / "x").exists()
    assert "cannot be started" in run_command("/no/such/program", EVENT)[0]
    assert "ended with 3" in run_command(f"{sys.executable} -c 'raise SystemExit(3)'", EVENT)[0]


def test_a_command_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"import subprocess, time; p = subprocess.Popen(['sleep', '60']); open('{pid}', 'w').write(str(p.pid)); time.sleep(60)"
    start = time.monotonic()
    (problem,) = run_command(f'{sys.executable} -c "{code}"', EVENT, seconds=2.0)
    assert "was ended after 2 s" in problem and time.monotonic() - start < 20
    time.sleep(0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
        stat = Path(f"/proc/{pid.read_text()}/stat").read_text()
        if stat.rsplit(")", 1)[1].split()[0] == "Z":  # ended, and waits for init
            raise ProcessLookupError


@pytest.fixture
def search(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a simulated search that tells its end by writing the event into a file."""
    (tmp_path / "keep.py").write_text("import sys\nopen(sys.argv[1], 'a').write(sys.stdin.read() + '\\n')\n")
    started = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = f"{sys.executable} {tmp_path / 'keep.py'} {tmp_path / 'events'}"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "paretune",
                "search",
                "--budget",
                "5m",
                "--home",
                "home",
                "--study",
                "s",
                "--notify-command",
                command,
                *options,
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "PARETUNE_EVALUATOR": "paretune.search.evaluators.simulated:SimulatedEvaluator",
                "PARETUNE_SIMULATED_SLEEP": "0.2",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def events(folder: Path, seconds: float = 60) -> list[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not (folder / "events").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    return [json.loads(line) for line in (folder / "events").read_text().splitlines()]


def test_the_end_of_a_search_is_told_once(search: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = search()
    wait_for(tmp_path / "home" / "studies" / "s" / "simulated.log", process)
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 130
    (event,) = events(tmp_path)
    assert event["event"] == "ended" and event["state"] == "interrupted" and event["exit_code"] == 130
    assert event["study"] == "s" and event["report"].endswith("report.html")
    assert json.loads((tmp_path / "home" / "studies" / "s" / TOLD).read_text())["problems"] == []


def test_the_death_of_a_search_is_told(search: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = search()
    wait_for(tmp_path / "home" / "studies" / "s" / "simulated.log", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(240)
    (event,) = events(tmp_path)
    assert event["event"] == "died" and event["state"] == "died"


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr and process.stderr.read()[-2000:]
        time.sleep(0.1)
