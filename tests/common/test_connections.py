"""Connections that owe something: they end, and keep nobody out; for the service and for an agent."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paretune.common import connections
from paretune.common.connections import HEAD_S, IDLE_S, Connection, Connections, client_of
from paretune.objectives.agent import server as agent_server
from paretune.objectives.agent.jobs import Jobs
from paretune.objectives.agent.server import Agent
from paretune.objectives.agent.store import ContentStore
from paretune.service.security import deadlines as served
from paretune.service.security.deadlines import MOST_CONNECTIONS, PER_ADDRESS, server_of
from paretune.service.server.serve import bind

SECRET = "the-token-of-this-test-0123456789"
RELEASED, HELD = threading.Event(), list[str]()


# the rules


class Known:
    """Connections with a clock of their own, and what was closed."""

    def __init__(self, most: int = 6, per_address: int = 3, proxy: str = "") -> None:
        self.moment, self.closed = 0.0, list[str]()
        self.all = Connections(most, per_address, lambda address: address == proxy, lambda: self.moment)

    def enter(self, address: str, name: str = "") -> Connection | None:
        self.moment += 0.01
        return self.all.enter(address, lambda: self.closed.append(name))


def test_an_address_has_a_limit_and_its_oldest_idle_connection_gives_way() -> None:
    known = Known()
    first, *_ = [known.enter("a", name) for name in "123"]
    assert first is not None
    first.work()
    assert known.enter("b") is not None and known.closed == []
    assert known.enter("a", "4") is not None and known.closed == ["2"], "not the one that works"
    for place in list(known.all.known):
        place.work()
    assert known.enter("a") is None and known.enter("b") is not None


def test_when_all_is_full_the_greediest_gives_way() -> None:
    known = Known(most=6)
    for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
        known.enter(name[0], name)
    assert known.enter("d") is not None and known.closed == ["a1"]
    assert len(known.all.known) == 6


def test_a_proxy_has_no_limit_of_its_own() -> None:
    known = Known(most=100, proxy="p")
    assert all(known.enter("p") is not None for _ in range(50)) and known.closed == []
    assert [known.enter("a") for _ in range(50)] and len(known.closed) == 47


def test_waits_end_and_work_does_not() -> None:
    known = Known()
    waits, works, answered = known.enter("a", "waits"), known.enter("a", "works"), known.enter("a", "answered")
    assert waits is not None and works is not None and answered is not None
    works.work()
    answered.wait(IDLE_S)
    known.moment = HEAD_S + 1
    known.all.close_overdue()
    assert known.closed == ["waits"]
    known.moment = 10_000.0
    known.all.close_overdue()
    assert known.closed == ["waits", "answered"]
    works.leave()
    assert not known.all.known


def test_what_counts_as_one_client() -> None:
    assert client_of("::ffff:192.0.2.1") == client_of("192.0.2.1") == "192.0.2.1"
    assert client_of("2001:db8::1") == client_of("2001:db8::ffff:1%eth0") != client_of("2001:db8:0:1::1")
    assert client_of("") == "" and client_of("testclient") == "testclient"


# the servers


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of a second."""
    monkeypatch.setattr(connections, "HEAD_S", 1.0)
    for module, name in ((served, "IDLE_S"), (agent_server, "IDLE_S"), (served, "READ_S"), (agent_server, "BODY_S")):
        monkeypatch.setattr(module, name, 1.0)


async def application(scope: Any, receive: Any, send: Any) -> None:
    """/large is 8 MB; /slow takes two seconds; /held takes until RELEASED."""
    if scope["type"] == "lifespan":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(2.0)
    if scope["path"] == "/held":
        HELD.append(scope["path"])
    while scope["path"] == "/held" and not RELEASED.is_set():
        await asyncio.sleep(0.2)
    body = b"x" * (8 << 20 if scope["path"] == "/large" else 2)
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    for at in range(0, len(body), 1 << 16):
        await send({"type": "http.response.body", "body": body[at : at + (1 << 16)], "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextlib.contextmanager
def running_service() -> Iterator[int]:
    listening = bind("127.0.0.1", 0)
    server = server_of(application)
    server.config.lifespan = "off"
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()


@contextlib.contextmanager
def running_agent(folder: Path) -> Iterator[int]:
    store = ContentStore(folder / "files", 10**8)
    jobs = Jobs(store, folder)
    agent = Agent(store, jobs, SECRET, {"cores": 1, "engines": []})
    with agent_server.bind("127.0.0.1", 0, agent) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join(20)
    jobs.close()


@pytest.fixture(params=["service", "agent"])
def port(request: pytest.FixtureRequest, tmp_path: Path, hurried: None) -> Iterator[int]:
    with running_service() if request.param == "service" else running_agent(tmp_path) as found:
        yield found


@pytest.fixture
def service_port(hurried: None) -> Iterator[int]:
    with running_service() as found:
        yield found


def head(port: int, path: str = "/v1/health", method: str = "GET", **more: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Authorization: Bearer {SECRET}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def status(connection: socket.socket) -> int:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def connect(port: int, stack: contextlib.ExitStack | None = None) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 15)
    return connection if stack is None else stack.enter_context(connection)


def seconds_until_closed(connection: socket.socket, every: bytes = b"") -> float:
    """How long the server keeps a connection on which `every` is sent five times a second; 15 s at most."""
    start = time.monotonic()
    connection.settimeout(0.2)
    while time.monotonic() < start + 15:
        with contextlib.suppress(TimeoutError):
            try:
                if every:
                    connection.sendall(every)
                if not connection.recv(65536):
                    break
            except (ConnectionError, BrokenPipeError):
                break
    return time.monotonic() - start


@pytest.mark.parametrize("begun", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-Y: "])
@pytest.mark.parametrize("every", [b"", b"a"], ids=["silent", "a byte at a time"])
def test_a_header_has_a_deadline(port: int, begun: bytes, every: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(begun)
        assert seconds_until_closed(connection, every) < 8


def test_a_further_header_has_one_too(port: int) -> None:
    with connect(port) as connection:
        for _ in range(2):
            connection.sendall(head(port))
            assert status(connection) == 200
        assert seconds_until_closed(connection, b"G") < 8


def test_idle_connections_keep_nobody_out(port: int) -> None:
    """More than the server takes, all from one address and all younger than any deadline."""
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_CONNECTIONS + 10):
            connect(port, stack)
        asked = connect(port, stack)
        asked.sendall(head(port))
        assert status(asked) == 200


def test_an_uploads_body_has_a_deadline(tmp_path: Path, hurried: None) -> None:
    with running_agent(tmp_path) as port, connect(port) as connection:
        kind = {"Content_Type": "application/octet-stream", "Content_Length": "1000"}
        connection.sendall(head(port, "/v1/artifacts/" + "a" * 64, "PUT", **kind))
        assert seconds_until_closed(connection, b"a") < 8
        deadline = time.monotonic() + 60
        while left := list((tmp_path / "files").iterdir()):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def test_work_has_no_deadline_of_a_connection(service_port: int) -> None:
    with connect(service_port) as connection:
        connection.sendall(head(service_port, "/slow"))
        assert status(connection) == 200


def test_an_answer_that_nobody_reads_has_a_deadline(service_port: int) -> None:
    with connect(service_port) as connection:
        connection.sendall(head(service_port, "/large"))
        time.sleep(4)
        received = 0
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 20):
                received += len(data)
        assert received < 8 << 20, "the rest was given up"


def test_what_follows_an_answer_does_not_prolong(service_port: int) -> None:
    """A body that is announced, answered before it is there, and then comes byte by byte."""
    with connect(service_port) as connection:
        connection.sendall(head(service_port, "/", "POST", Content_Length="100000"))
        assert status(connection) == 200
        assert seconds_until_closed(connection, b"a") < 8


def test_an_address_that_only_works_is_refused_beyond_its_limit(service_port: int) -> None:
    RELEASED.clear()
    HELD.clear()
    with contextlib.ExitStack() as stack:
        stack.callback(RELEASED.set)
        for _ in range(PER_ADDRESS):
            connect(service_port, stack).sendall(head(service_port, "/held"))
        deadline = time.monotonic() + 120
        while len(HELD) < PER_ADDRESS:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert status(connect(service_port, stack)) == 503
        other = stack.enter_context(socket.create_connection(("127.0.0.1", service_port), 15, ("127.0.0.2", 0)))
        other.sendall(head(service_port))
        assert status(other) == 200, "another address has room"


def test_bad_requests_are_answered_in_words(service_port: int, capfd: pytest.CaptureFixture[str]) -> None:
    for request, code in ((b"no request\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nCookie: " + b"x" * 400_000, 431)):
        with connect(service_port) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == code and json.loads(answer.read())["error"]
    with connect(service_port) as connection:
        connection.sendall(head(service_port, Upgrade="websocket", Connection="Upgrade"))
        assert status(connection) == 200
    assert capfd.readouterr().err == "", "strangers do not fill the log"
