"""The measuring agent: who it answers, what it takes, its jobs, and its client. A job's process is a stand-in that answers at once."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from paretune.cli import app as cli
from paretune.common import agent_access
from paretune.common.agent_access import TOKEN, given_token, host_is_known, is_loopback, token_matches
from paretune.common.errors import EnvironmentProblem, Infeasible, UsageError
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.agent import jobs as agent_jobs
from paretune.objectives.agent import server as agent_server
from paretune.objectives.agent.client import ATTEMPTS, AgentClient, RemoteBenchmark
from paretune.objectives.agent.job import require_own_files
from paretune.objectives.agent.jobs import MOST_WAITING, Job, Jobs, TooMany
from paretune.objectives.agent.onnx_files import external_locations
from paretune.objectives.agent.order import Order
from paretune.objectives.agent.server import Agent, AgentServer, bind
from paretune.objectives.agent.start import facts, new_token, serving, token_for
from paretune.objectives.agent.store import ContentStore, Full, WrongChecksum
from paretune.objectives.agent.wire import AgentGone, Timeouts, Wire

SECRET = "the-token-of-this-test-0123456789"
FAST = Timeouts(answer=5.0, patience=0.5, job=20.0, poll=0.02)
MEASURED = {"value": 1.5, "unit": "ms/token", "low": 1.4, "high": 1.6, "provenance": "measured", "samples": 9}
# Stands for agent_job: what it does is written in the model file.
STAND_IN = """
import json, os, sys, time
request = json.loads(sys.stdin.read())
text = open(os.path.join(request["folder"], "model.onnx")).read()
if text == "crash":
    sys.exit("the engine is on fire")
if text == "refuse":
    print(json.dumps({"ok": False, "kind": "infeasible", "problem": "op X is unknown", "remedy": ""}))
    sys.exit()
with open(os.path.join(request["kept"], "times"), "a") as log:
    log.write(f"begin {os.getpid()}\\n")
if text.startswith("sleep"):
    time.sleep(float(text.split()[1]))
with open(os.path.join(request["kept"], "times"), "a") as log:
    log.write(f"end {os.getpid()}\\n")
value = "nan" if text == "nan" else 1.5
names = sorted(os.listdir(request["folder"]))
print(json.dumps({"ok": True, "stable": True, "measurements": {"decode_ms_per_token":
    {"value": float(value), "unit": "ms/token", "low": 1.4, "high": 1.6, "provenance": "measured", "samples": 9,
     "note": " ".join(names)}}}))
"""


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def order(model: bytes = b"model", reference: bytes = b"reference", key: str = "k", **more: Any) -> Order:
    return Order(key, digest_of(model), digest_of(reference), 1, **more)


def fill(store: ContentStore, *contents: bytes) -> None:
    for data in contents:
        store.put(digest_of(data), io.BytesIO(data), len(data))


def until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "agent" / "files", 100_000)


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return sys.executable, "-S", str(tmp_path / "stand_in.py")


@pytest.fixture
def jobs(store: ContentStore, tmp_path: Path, command: tuple[str, ...]) -> Iterator[Jobs]:
    fill(store, b"model", b"reference")
    found = Jobs(store, tmp_path / "agent", 30.0, command)
    yield found
    found.close()


@pytest.fixture
def server(store: ContentStore, jobs: Jobs) -> Iterator[AgentServer]:
    agent = Agent(
        store, jobs, SECRET, {"cores": 2, "engines": ["onnxruntime"], "fingerprint": "f" * 12}, frozenset({"board.lan"})
    )
    with bind("127.0.0.1", 0, agent) as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture
def url(server: AgentServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def client(url: str) -> AgentClient:
    return AgentClient(url, SECRET, FAST)


def talk(
    server: AgentServer, method: str, path: str, body: bytes = b"", **headers: str | None
) -> tuple[int, dict[str, Any]]:
    """One request as it stands; a header of None is left out."""
    port = server.server_address[1]
    usual = {"Host": f"127.0.0.1:{port}", "Authorization": f"Bearer {SECRET}", "Content-Length": str(len(body))}
    sent = {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items() if value is not None)]
    return raw(port, "\r\n".join([*lines, "", ""]).encode() + body)


def raw(port: int, request: bytes) -> tuple[int, dict[str, Any]]:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection, method=request.split()[0].decode())
        response.begin()
        data = response.read()
        assert response.headers["Content-Type"] == "application/json" and "Python" not in response.headers["Server"]
        return response.status, json.loads(data) if data else {}


def files_of(store: ContentStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


# who is answered


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Authorization": None}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": f"Bearer {SECRET[:-1]}"}, 401),
        ({"Authorization": f"Bearer {SECRET}x"}, 401),
        ({"Authorization": f"Basic {SECRET}"}, 401),
        ({"Authorization": SECRET}, 401),
        ({"Host": None}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Host": "127.0.0.1:{port}.evil.example"}, 403),
        ({"Host": "localhost.evil.example:{port}"}, 403),
        ({"Host": "0.0.0.0:{port}"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "Board.lan:{port}"}, 200),
        ({"Host": "board.lan"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Content_Length": "-1"}, 400),
        ({"Content_Length": "1e3"}, 400),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
    ids=str,
)
def test_access(server: AgentServer, headers: dict[str, str | None], status: int) -> None:
    port = str(server.server_address[1])
    sent: dict[str, Any] = {name: value and value.replace("{port}", port) for name, value in headers.items()}
    found, told = talk(server, "GET", "/v1/health", **sent)
    assert found == status
    assert ("error" in told) == (status != 200)
    assert SECRET not in json.dumps(told)


@pytest.mark.parametrize("name", ["Host", "Authorization", "Content-Length"])
def test_a_header_that_comes_twice_is_refused(server: AgentServer, name: str) -> None:
    """Two readers of one request must not see two requests."""
    port = server.server_address[1]
    lines = [f"Host: 127.0.0.1:{port}", f"Authorization: Bearer {SECRET}", "Content-Length: 0"]
    twice = [line for line in lines if line.startswith(name)]
    assert raw(port, "\r\n".join(["GET /v1/health HTTP/1.1", *lines, "", ""]).encode())[0] == 200
    assert raw(port, "\r\n".join(["GET /v1/health HTTP/1.1", *lines, *twice, "", ""]).encode())[0] == 400


def test_nonsense_is_answered_as_json(server: AgentServer) -> None:
    port = server.server_address[1]
    for request in (b"PATCH /v1/health HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /" + 70_000 * b"a" + b" HTTP/1.1\r\n\r\n"):
        status, told = raw(port, request)
        assert status in (400, 414, 501) and "error" in told


def test_a_token_is_compared_as_a_whole() -> None:
    assert token_matches(f"Bearer {SECRET}", SECRET)
    assert not any(
        token_matches(h, SECRET)
        for h in (None, "", "Bearer ", f"bearer {SECRET}", f"Bearer {SECRET} ", "Bearer \udcff")
    )


def test_an_address_is_known_by_itself_only() -> None:
    assert host_is_known("192.168.1.7:7411", "192.168.1.7", 7411)
    assert not host_is_known("localhost:7411", "192.168.1.7", 7411)
    assert not host_is_known("192.168.1.8:7411", "192.168.1.7", 7411)
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "0.0.0.0", "board.lan")] == [
        True
    ] * 4 + [False] * 2


def test_a_token_is_made_once_and_kept_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert given_token(tmp_path) is None
    file = tmp_path / "agent" / "token"
    assert token_for("127.0.0.1", tmp_path) is None and not file.exists(), "it is made once the agent has its port"
    with serving(tmp_path, detected_profile(), None, port=0) as server:
        token = server.agent.token
        assert len(token) >= 43 and file.read_text().strip() == token
        with pytest.raises(EnvironmentProblem, match="another agent runs"):
            new_token(tmp_path)
    assert file.read_text().strip() == token, "the running agent's own"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert token_for("0.0.0.0", tmp_path) == token
    assert new_token(tmp_path) != token and file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    with pytest.raises(EnvironmentProblem, match="mode is 0640"):
        given_token(tmp_path)
    monkeypatch.setenv(TOKEN, SECRET)
    assert given_token(tmp_path) == SECRET
    for bad in ("short", "with space in the middle", "x" * 300):
        monkeypatch.setenv(TOKEN, bad)
        with pytest.raises(UsageError, match="printable ASCII") as error:
            given_token(tmp_path)
        assert bad not in str(error.value)


def test_another_machines_token_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    mine = new_token(tmp_path)
    other = tmp_path / "agent" / "board.lan_7411.token"
    other.write_text(SECRET)
    other.chmod(0o600)
    assert given_token(tmp_path, "board.lan_7411") == SECRET
    assert (
        given_token(tmp_path, "127.0.0.1_7411") == given_token(tmp_path, "localhost_1") == given_token(tmp_path) == mine
    )
    assert given_token(tmp_path, "other_7411") is None, "a profile from a stranger must not get this home's own token"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", ""])
def test_other_machines_are_not_served_without_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], host: str
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setattr(sys, "argv", ["paretune", "agent", "--host", host, "--home", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "needs a token" in capfd.readouterr().err
    assert not (tmp_path / "agent" / "token").exists()


# what is taken


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/health/",
        "/v1/health?x=1",
        "/v1/health%00",
        "/v1/../v1/health",
        "/v1/artifacts/../../../etc/passwd",
        "/v1/artifacts/..%2f..%2fetc%2fpasswd",
        "/v1/artifacts/" + "a" * 63,
        "/v1/artifacts/" + "a" * 65,
        "/v1/artifacts/" + "A" * 64,
        "/v1/artifacts/" + "a" * 64 + "/..",
        "/v1/artifacts//" + "a" * 64,
        "/v1/measurements/../health",
        "/v1/measurements/" + "a" * 65,
        "/v1/measurements/A",
        "file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_no_path_but_an_id_is_understood(server: AgentServer, store: ContentStore, method: str, path: str) -> None:
    before = files_of(store)
    assert talk(server, method, path, b"x", Content_Type="application/octet-stream")[0] == 404
    assert files_of(store) == before


def test_an_upload_is_kept_only_with_the_right_checksum(server: AgentServer, store: ContentStore) -> None:
    before, data = files_of(store), os.urandom(3000)
    kind = {"Content_Type": "application/octet-stream"}
    path = f"/v1/artifacts/{digest_of(data)}"
    assert talk(server, "HEAD", path)[0] == 404
    status, told = talk(server, "PUT", path, data[:-1] + b"\0", **kind)
    assert status == 422 and digest_of(data[:-1] + b"\0") in told["error"]
    assert talk(server, "PUT", path, data, Content_Type="text/plain")[0] == 415
    assert talk(server, "PUT", path, data, **kind, Content_Length="200000")[0] == 413
    with contextlib.suppress(http.client.HTTPException, ConnectionError):
        talk(server, "PUT", path, data, **kind, Content_Length="3001")  # the connection ends before the body
    until(lambda: files_of(store) == before)
    assert talk(server, "PUT", path, data, **kind)[0] == 200
    assert talk(server, "HEAD", path)[0] == 200
    assert (store.folder / digest_of(data)).read_bytes() == data
    assert talk(server, "GET", path)[0] == 405, "what is uploaded cannot be fetched"


def test_a_file_is_sent_once(server: AgentServer, client: AgentClient, tmp_path: Path) -> None:
    model = tmp_path / "some.onnx"
    model.write_bytes(os.urandom(5000))
    asked: list[str] = []
    once = client.wire._once
    client.wire._once = lambda method, *rest: (asked.append(method), once(method, *rest))[1]  # type: ignore[method-assign, func-returns-value]
    digest = client.upload(model)
    assert client.upload(model) == digest == digest_of(model.read_bytes())
    assert asked == ["HEAD", "PUT", "HEAD"]
    model.write_bytes(b"changed")
    assert client.upload(model) == digest_of(b"changed")
    assert asked[3:] == ["HEAD", "PUT"]


def test_the_disk_is_bounded_and_the_unused_go_first(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, 10)
    contents = [bytes([48 + i]) * 4 for i in range(4)]
    names = [digest_of(data) for data in contents]
    fill(store, contents[0], contents[1])
    os.utime(store.folder / names[0], (1, 1))
    os.utime(store.folder / names[1], (2, 2))
    assert store.path(names[0]) is not None  # used now
    fill(store, contents[2])
    assert files_of(store) == {names[0], names[2]}
    with pytest.raises(Full, match="at most 10 bytes"):
        store.put(names[3], io.BytesIO(contents[3]), 4, needed={names[0], names[2]})
    assert files_of(store) == {names[0], names[2]}, "nothing is sent away in vain"
    with pytest.raises(Full):
        store.put(names[3], io.BytesIO(bytes(11)), 11)
    with pytest.raises(WrongChecksum):
        store.put(names[3], io.BytesIO(b"1234"), 4)
    assert not {name for name in files_of(store) if name.endswith(".part")}
    (tmp_path / "left.part").write_text("of a killed agent")
    assert "left.part" not in files_of(ContentStore(tmp_path, 10))


def test_a_file_that_does_not_fit_beside_what_jobs_need_is_refused(
    client: AgentClient, jobs: Jobs, store: ContentStore, tmp_path: Path
) -> None:
    store.max_bytes = 5000
    fill(store, b"sleep 20")
    job = jobs.submit(order(b"sleep 20"))
    big = tmp_path / "big"
    big.write_bytes(bytes(4990))
    with pytest.raises(EnvironmentProblem, match=r"4,990 more do not fit"):
        client.upload(big)
    jobs.cancel(job.id)
    until(lambda: job.state == "failed")
    assert client.upload(big)


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b" " * 70_000, "application/json", 413),
        (b"[]", "application/json", 422),
        (b"{}", "application/json", 422),
        (b"null", "application/json", 422),
        (b"{}", "text/plain", 415),
        (b"{}", "application/x-www-form-urlencoded", 415),
        (b"{}", None, 415),
    ],
    ids=lambda value: str(value)[:20],
)
def test_only_json_is_an_order(server: AgentServer, body: bytes, kind: str | None, status: int) -> None:
    found, told = talk(server, "POST", "/v1/measurements", body, Content_Type=kind)
    assert found == status and told["error"]


@pytest.mark.parametrize(
    "change",
    [
        {"key": "../x"},
        {"key": ""},
        {"model": "/etc/passwd"},
        {"model": 7},
        {"model": None},
        {"threads": 0},
        {"threads": 3},
        {"threads": True},
        {"threads": "1"},
        {"visits": "many"},
        {"engine": "os"},
        {"engine": "torch"},
        {"provider": "a b"},
        {"data": "0" * 64},
        {"data": "0" * 64, "data_name": "../x.onnx.data"},
        {"data_name": "x.onnx.data"},
        {"within": 0},
        {"within": "1"},
        {"path": "/etc/passwd"},
    ],
    ids=str,
)
def test_an_order_is_checked(server: AgentServer, jobs: Jobs, change: dict[str, Any]) -> None:
    body = json.dumps({**order().to_dict(), **change}).encode()
    status, told = talk(server, "POST", "/v1/measurements", body, Content_Type="application/json")
    assert status == 422 and next(iter(change)).split("_")[0] in told["error"]
    assert jobs.counts() == (False, 0)


def test_an_order_of_unknown_files_names_them(server: AgentServer) -> None:
    body = json.dumps(order(b"never sent").to_dict()).encode()
    status, told = talk(server, "POST", "/v1/measurements", body, Content_Type="application/json")
    assert (status, told["missing"]) == (409, [digest_of(b"never sent")])


# jobs


def test_jobs_run_one_after_the_other(jobs: Jobs, store: ContentStore, tmp_path: Path) -> None:
    fill(store, b"sleep 0.1")
    found = [jobs.submit(order(b"sleep 0.1", key=f"k{i}")) for i in range(3)]
    until(lambda: all(job.state == "done" for job in found))
    lines = [line.split() for line in (tmp_path / "agent" / "times").read_text().splitlines()]
    assert [what for what, _ in lines] == ["begin", "end"] * 3
    assert all(lines[i][1] == lines[i + 1][1] for i in range(0, 6, 2)) and len({pid for _, pid in lines}) == 3
    assert not any((tmp_path / "agent" / "work").iterdir())


def test_an_order_that_is_repeated_is_one_job(server: AgentServer) -> None:
    body = json.dumps(order().to_dict()).encode()
    found = [talk(server, "POST", "/v1/measurements", body, Content_Type="application/json")[1]["id"] for _ in range(2)]
    assert found[0] == found[1]
    other = json.dumps(order(key="other").to_dict()).encode()
    assert talk(server, "POST", "/v1/measurements", other, Content_Type="application/json")[1]["id"] != found[0]


def test_a_running_job_is_cancelled_with_its_process(
    server: AgentServer, jobs: Jobs, store: ContentStore, tmp_path: Path
) -> None:
    fill(store, b"sleep 30")
    running, waiting = jobs.submit(order(b"sleep 30")), jobs.submit(order(key="next"))
    last = jobs.submit(order(key="last"))
    until(lambda: (tmp_path / "agent" / "times").exists() and running.process)
    assert jobs.counts() == (True, 2)
    assert talk(server, "DELETE", f"/v1/measurements/{waiting.id}")[1]["state"] == "failed"
    talk(server, "DELETE", f"/v1/measurements/{running.id}")
    until(lambda: last.state == "done", 10)
    assert running.process is not None and running.process.poll() == -9
    status, told = talk(server, "GET", f"/v1/measurements/{running.id}")
    assert status == 200 and told["state"] == "failed" and told["error"]["kind"] == "cancelled"
    assert talk(server, "DELETE", f"/v1/measurements/{last.id}")[1]["state"] == "done"
    assert talk(server, "GET", "/v1/measurements/unknown")[0] == 404


def test_a_job_that_crashes_or_hangs_is_only_its_own_failure(jobs: Jobs, store: ContentStore) -> None:
    fill(store, b"crash", b"sleep 30")
    crashed = jobs.submit(order(b"crash"))
    until(lambda: crashed.state == "failed")
    assert "the engine is on fire" in crashed.answer["error"]["problem"]
    jobs.timeout_s = 0.3
    hung = jobs.submit(order(b"sleep 30", key="hung"))
    until(lambda: hung.state == "failed")
    assert "more than 0 s" in hung.answer["error"]["problem"]
    jobs.timeout_s = 30.0
    good = jobs.submit(order(key="good"))
    until(lambda: good.state == "done")
    (store.folder / digest_of(b"model")).unlink()
    assert store.path(digest_of(b"model")) is None


def test_a_file_that_vanishes_from_the_disk_is_only_that_jobs_failure(jobs: Jobs, store: ContentStore) -> None:
    fill(store, b"sleep 0.3")
    first, second = jobs.submit(order(b"sleep 0.3")), jobs.submit(order(key="second"))
    (store.folder / digest_of(b"model")).unlink()
    until(lambda: second.state == "failed")
    assert "FileNotFoundError" in second.answer["error"]["problem"] and first.state == "done"


def test_orders_beyond_the_queue_wait_outside(jobs: Jobs, store: ContentStore) -> None:
    fill(store, b"sleep 30")
    first = jobs.submit(order(b"sleep 30", key="first"))
    until(lambda: first.state == "running")
    for i in range(MOST_WAITING):
        jobs.submit(order(b"sleep 30", key=f"k{i}"))
    with pytest.raises(TooMany):
        jobs.submit(order(b"sleep 30", key="one-more"))


def test_what_has_ended_is_forgotten_in_the_end(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_jobs, "MOST_REMEMBERED", 2)
    found: list[Job] = []
    for i in range(4):
        found.append(jobs.submit(order(key=f"k{i}")))
        until(lambda: found[-1].state == "done")
    assert [jobs.get(job.id) is None for job in found] == [True, True, False, False]


# models


def graph_with(location: str, inner: bool) -> onnx.ModelProto:
    """A model with one external tensor: an initializer, or in the attribute of a node of an If's branch."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        tensor.external_data.add(key=key, value=value)
    constant = (
        helper.make_node("Constant", [], ["y"], value=tensor) if inner else helper.make_node("Identity", ["w"], ["y"])
    )
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
    if inner:
        branch = helper.make_graph([constant], "branch", [], out)
        condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        return helper.make_model(helper.make_graph([node], "g", [], out, [condition]))
    other = helper.make_tensor("v", TensorProto.FLOAT, [500], list(range(500)))
    return helper.make_model(helper.make_graph([constant], "g", [], out, [other, tensor]))


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("location", ["model.onnx.data", "/etc/passwd", "../up", "a/b"])
def test_a_model_names_no_file_but_the_one_sent_with_it(tmp_path: Path, location: str, inner: bool) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(graph_with(location, inner).SerializeToString())
    assert external_locations(model) == {location}
    if location == "model.onnx.data":
        require_own_files(model, {location})
    with pytest.raises(Infeasible, match="weights are inside it or in the file sent with it"):
        require_own_files(model, {"other.onnx.data"})


def test_a_model_with_its_weights_inside_names_no_file(tmp_path: Path) -> None:
    plain = helper.make_tensor("location", TensorProto.FLOAT, [9000], b"location" * 4500, raw=True)
    model = tmp_path / "m.onnx"
    model.write_bytes(helper.make_model(helper.make_graph([], "location", [], [], [plain])).SerializeToString())
    assert external_locations(model) == set()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no model at all",
        b"\x3a\xff\xff\xff\xff\x0f",
        b"\x08" + b"\xff" * 11,
        b"\x0b",
        b"\xea\x80\x80\x80\x10\x00",
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(Infeasible, match="no ONNX file"):
        require_own_files(tmp_path / "m.onnx", set())


# the client


@pytest.fixture
def files(tmp_path: Path) -> Callable[[bytes], RemoteBenchmark]:
    (tmp_path / "reference").write_bytes(b"reference")
    (tmp_path / "fit.onnx").write_bytes(b"model")
    return lambda data: (tmp_path / "fit.onnx").write_bytes(data) and tmp_path / "fit.onnx"  # type: ignore[return-value]


def test_a_measurement_comes_back_as_the_lane_gave_it(client: AgentClient, tmp_path: Path, files: Any) -> None:
    benchmark = RemoteBenchmark(client, tmp_path / "reference", 1)
    model = files(b"model")
    found = benchmark.measure(model)
    assert found.stable and client.orders == 1
    assert found.measurements["decode_ms_per_token"].to_dict() == {
        **MEASURED,
        "fingerprint": "",
        "note": "model.onnx reference.onnx",
    }
    model.with_name("fit.onnx.data").write_bytes(b"weights")
    with benchmark.pair() as pair:
        found = benchmark.quick(model, pair)
    assert found.measurements["decode_ms_per_token"].note == "fit.onnx.data model.onnx reference.onnx"


def test_the_interval_and_the_engine_that_are_asked_for_reach_the_job(
    client: AgentClient, jobs: Jobs, tmp_path: Path, files: Any
) -> None:
    RemoteBenchmark(client, tmp_path / "reference", 2, "onnxruntime", "OtherProvider").measure(files(b"model"), 0.02)
    (job,) = jobs._jobs.values()
    assert (job.order.within, job.order.threads, job.order.visits, job.order.provider) == (
        0.02,
        2,
        "full",
        "OtherProvider",
    )


def test_the_lanes_reasons_come_back_too(client: AgentClient, tmp_path: Path, files: Any) -> None:
    benchmark = RemoteBenchmark(client, tmp_path / "reference", 1)
    with pytest.raises(Infeasible, match="op X is unknown"):
        benchmark.measure(files(b"refuse"))
    with pytest.raises(EnvironmentProblem, match="on fire"):
        benchmark.measure(files(b"crash"))
    with pytest.raises(EnvironmentProblem, match="figures that are none: a value must be finite"):
        benchmark.measure(files(b"nan"))
    with pytest.raises(EnvironmentProblem, match="threads must be at most 2"):
        RemoteBenchmark(client, tmp_path / "reference", 3).measure(files(b"model"))


def test_an_agent_that_is_too_slow_is_given_up_and_its_job_cancelled(
    url: str, jobs: Jobs, tmp_path: Path, files: Any
) -> None:
    hasty = AgentClient(url, SECRET, Timeouts(answer=5.0, patience=0.5, job=0.3, poll=0.02))
    with pytest.raises(AgentGone, match="has not measured within 0 s"):
        RemoteBenchmark(hasty, tmp_path / "reference", 1).measure(files(b"sleep 30"))
    until(lambda: jobs.counts() == (False, 0), 10)


def test_an_agent_that_forgets_is_asked_again_up_to_a_cap(
    client: AgentClient, jobs: Jobs, tmp_path: Path, files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "get", lambda _name: None)
    with pytest.raises(AgentGone, match=f"lost the measurement {ATTEMPTS} times"):
        RemoteBenchmark(client, tmp_path / "reference", 1).measure(files(b"model"))
    assert client.orders == ATTEMPTS
    fresh = AgentClient(client.wire.url, SECRET, FAST)
    lost = iter([None])
    get = Jobs.get
    monkeypatch.setattr(jobs, "get", lambda name: next(lost, get(jobs, name)))
    assert RemoteBenchmark(fresh, tmp_path / "reference", 1).measure(files(b"model")).stable
    assert fresh.orders == 2


def test_nobody_there_is_said_within_the_patience(url: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = AgentClient(f"http://127.0.0.1:{taken.getsockname()[1]}", SECRET, FAST)
        began = time.monotonic()
        with pytest.raises(AgentGone, match="no agent answers at"):
            nobody.health()
        assert time.monotonic() - began < 10
    with pytest.raises(UsageError, match="needs `Authorization: Bearer`"):
        AgentClient(url, SECRET + "x", FAST).health()


def test_a_busy_agent_is_asked_again(client: AgentClient, monkeypatch: pytest.MonkeyPatch) -> None:
    health, tries = Agent.health, []

    def sometimes(self: Agent) -> dict[str, Any]:
        tries.append(1)
        if len(tries) < 3:
            raise agent_server.Refusal(503, "busy")
        return health(self)

    monkeypatch.setattr(Agent, "health", sometimes)
    patient = AgentClient(client.wire.url, SECRET, Timeouts(answer=5.0, patience=20.0))
    assert patient.health()["fingerprint"] == "f" * 12 and len(tries) == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"SSH-2.0\r\n",
        b"",
        b"HTTP/1.1 302 F\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_something_else_that_listens_there_is_no_agent(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises((AgentGone, UsageError), match=r"no agent answers|is no paretune agent"):
            AgentClient(f"http://127.0.0.1:{listening.getsockname()[1]}", SECRET, FAST).health()


@pytest.mark.parametrize(
    "url",
    [
        "board.lan:7411",
        "ftp://x:1",
        "http://x",
        "http://u:p@x:1",
        "http://x:0",
        "http://x:99999",
        "http://x:1/path",
        "http://x:1\r\nA: b",
    ],
)
def test_what_is_no_url_of_an_agent(url: str) -> None:
    with pytest.raises(UsageError, match="must be http://HOST:PORT"):
        Wire(url, SECRET, FAST)


# the service as a whole


def test_an_agent_tells_what_it_is_and_there_is_one_per_home(tmp_path: Path) -> None:
    profile = detected_profile()
    with serving(tmp_path, profile, SECRET, port=0) as first:
        threading.Thread(target=first.serve_forever, daemon=True).start()
        port = first.server_address[1]
        told = AgentClient(f"http://127.0.0.1:{port}", SECRET, FAST).health()
        with pytest.raises(EnvironmentProblem, match="another agent runs"), serving(tmp_path, profile, SECRET, port=0):
            pass
        with (
            pytest.raises(EnvironmentProblem, match="cannot listen on"),
            serving(tmp_path / "b", profile, SECRET, port=port),
        ):
            pass
        first.shutdown()
    assert told.items() >= facts(profile).items() and told["busy"] is False
    assert told["profile"]["name"] == "local-cpu" and "onnxruntime" in told["engines"]
    with serving(tmp_path, profile, SECRET, port=0):
        """Its lock is free again."""


HEAVY = {"torch", "ray", "mlflow", "pandas", "transformers", "optuna", "sqlalchemy", "onnx", "matplotlib"}
PROGRAM = """
import sys, threading
before = set(sys.modules)
from pathlib import Path
import paretune.cli.app, paretune.cli.commands.agent, paretune.engines.process.worker, paretune.engines.onnxruntime.decoder
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.agent.client import AgentClient
from paretune.objectives.agent.job import answer
from paretune.objectives.agent.start import serving
home = Path(sys.argv[1])
with serving(home, detected_profile(), "x" * 32, port=0) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    AgentClient(f"http://127.0.0.1:{server.server_address[1]}", "x" * 32).health()
    server.shutdown()
order = {"key": "k", "model": "0" * 64, "reference": "0" * 64, "threads": 1}
(home / "model.onnx").write_bytes(b"")
assert answer({"order": order, "folder": str(home), "kept": str(home)})["kind"] == "infeasible"
from paretune.objectives.latency.benchmark import moderated_interval
moderated_interval([1.0, 1.1], 0.01)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_an_agent_needs_the_engine_and_numpy_only(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"numpy", "onnxruntime", "http", "paretune"} <= loaded
    assert not loaded & HEAVY


def test_the_token_is_not_compared_with_equality() -> None:
    """The one comparison of the token is the constant-time one."""
    text = Path(agent_access.__file__).read_text() + Path(agent_server.__file__).read_text()
    assert text.count("compare_digest(") == 1 and "== agent.token" not in text and "token ==" not in text
