"""What of MLflow can be reached through the service and `paretune ui`, and by whom."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from paretune.service.security.guard import Guard
from paretune.service.security.sessions import COOKIE, UI_COOKIE
from paretune.service.server.mlflow_ui import OneLink, Visitors
from paretune.tracking.mlflow.app import ALLOWED, PREFIX, READS, ReadOnly, environment_of, is_allowed

FORBIDDEN = re.compile(
    r"assistant|gateway|/jobs?\b|webhook|mcp|invocations|invoke|scorer|prompt|secret|trace|upload|presigned|mlflow-artifacts|otel|/v1/|"
    r"create|delete|update|set-|log-|restore|rename|transition|workspaces|demo|review|label|issues|/api/"
)
ROUTES = """
import json, sys
from mlflow.server import app as flask_app
from mlflow.server.fastapi_app import app

def walk(routes, before=""):
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from walk(inner.routes, before + (getattr(route.include_context, "prefix", "") or ""))
        elif getattr(route, "methods", None):
            yield from ((method, before + route.path) for method in route.methods)

found = set(walk(app.routes)) | {(m, rule.rule) for rule in flask_app.url_map.iter_rules() for m in rule.methods}
json.dump(sorted(found), sys.stdout)
"""


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """(method, path) of every route of the installed MLflow, with a word for every parameter."""
    import json

    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-c", ROUTES], env=environment_of(home), capture_output=True, check=True, timeout=120
    )
    return [(method, re.sub(r"[<{][^>}]+[>}]", "word", path)) for method, path in json.loads(done.stdout)]


def test_of_all_routes_only_those_for_looking_are_served(routes: list[tuple[str, str]]) -> None:
    """A pattern that became too wide, or a route that a new version adds below it, fails here."""
    served = {(m, p) for m, p in routes if is_allowed(m, p, p.encode())}
    refused = set(routes) - served
    assert [
        p
        for m, p in served
        if m not in ("GET", "HEAD") and not p.endswith(("search", "search-datasets", "graphql", "versions"))
    ] == []
    assert [p for _, p in served if FORBIDDEN.search(p)] == []
    assert any("assistant" in p for _, p in refused) and any("gateway" in p for _, p in refused)
    assert len(refused) > 400 and 20 < len({p for _, p in served}) <= len(READS)


def test_every_entry_of_the_list_is_a_route_of_this_version(routes: list[tuple[str, str]]) -> None:
    known = {(m, p) for m, p in routes} | {("GET", f"{PREFIX}/paretune-settled.js"), ("GET", f"{PREFIX}/health")}
    known |= {(m, PREFIX + p) for m, p in routes}  # FastAPI's own routes are named without the prefix
    for method, pattern in ALLOWED:
        assert any(method == m and pattern.fullmatch(p) for m, p in known), (method, pattern.pattern)


def test_graphql_has_the_fields_that_somebody_has_looked_at(tmp_path: Path) -> None:
    """One route with many uses: a field that a new version adds fails here. All of these read."""
    import json

    code = (
        "import json; from mlflow.server.graphql.graphql_schema_extensions import schema; s = schema.graphql_schema; "
        "print(json.dumps(sorted({*s.query_type.fields, *s.mutation_type.fields})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment_of(tmp_path), capture_output=True, check=True, timeout=120
    )
    known = (
        "GetExperiment GetMetricHistoryBulkInterval GetRun ListArtifacts SearchDatasets SearchModelVersions SearchRuns"
    )
    assert set(json.loads(done.stdout)) == {*(f"mlflow{name}" for name in known.split()), "test", "testMutation"}


@pytest.mark.parametrize(
    "path",
    [
        "/mlflow/ajax-api/3.0/mlflow/assistant/config",
        "/mlflow//ajax-api/2.0/mlflow/runs/get",
        "/mlflow/static-files/../ajax-api/3.0/mlflow/assistant/config",
        "/mlflow/static-files/%2e%2e/ajax-api/3.0/mlflow/assistant/config",
        "/mlflow/ajax-api/2.0/mlflow/runs/get/",
        "/MLFLOW/ajax-api/2.0/mlflow/runs/get",
        "/mlflow/api/2.0/mlflow/runs/get",
        "/ajax-api/2.0/mlflow/runs/get",
        "/mlflow/ajax-api/2.0/mlflow/logged-models/m/../../runs/create",
        "/mlflow/ajax-api/2.0/mlflow/runs/get\n",
        "/mlflow/ajax-api/2.0/mlflow/runs/get;x",
        "/mlflow/get-artifact/../x",
    ],
)
def test_tricks_with_paths(path: str) -> None:
    assert not is_allowed("GET", path, path.encode())


def test_methods_count() -> None:
    path = f"{PREFIX}/ajax-api/2.0/mlflow/runs/search"
    assert is_allowed("POST", path, path.encode())
    assert not any(is_allowed(method, path, path.encode()) for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Reached:
    """An application that says what reached it."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.kinds.append(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"MLflow"})


def test_refusals_websockets_and_the_page_without_assistant() -> None:
    reached = Reached()
    client = TestClient(ReadOnly(reached, "<html><head></head><body></body></html>"))
    assert client.post(f"{PREFIX}/ajax-api/3.0/mlflow/assistant/message", json={}).status_code == 404
    assert client.put(f"{PREFIX}/ajax-api/3.0/mlflow/assistant/config", json={}).status_code == 404
    page = client.get(f"{PREFIX}/").text
    assert "[data-assistant-ui] { display: none !important }" in page and "./paretune-settled.js" in page
    assert "assistant.panelOpen_v1" in client.get(f"{PREFIX}/paretune-settled.js").text
    assert reached.kinds == []
    assert client.get(f"{PREFIX}/version").text == "MLflow"
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(ReadOnly(reached, "")({"type": "websocket", "path": f"{PREFIX}/version"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}] and reached.kinds == ["http"]


def test_no_secret_and_no_setting_of_another_mlflow(tmp_path: Path) -> None:
    given = {
        "PATH": "/bin",
        "PARETUNE_TOKEN": "a",
        "PARETUNE_AGENT_TOKEN": "b",
        "PARETUNE_NOTIFY_SECRET": "c",
        "MLFLOW_TRACKING_PASSWORD": "d",
        "AWS_SECRET_ACCESS_KEY": "e",
        "OPENAI_API_KEY": "f",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true",
    }
    found = environment_of(tmp_path, given)
    assert not {"a", "b", "c", "d", "e", "f"} & set(found.values()) and found["PATH"] == "/bin"
    assert found["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == found["_MLFLOW_SERVER_SERVE_ARTIFACTS"] == "false"
    assert not [name for name in found if name.startswith("PARETUNE")]


def test_the_link_of_ui_opens_once() -> None:
    visitors = Visitors()
    links = OneLink(visitors, "/mlflow/#/experiments/1")
    client = TestClient(Guard(links, visitors), base_url="http://127.0.0.1:5000", follow_redirects=False)
    assert client.get("/").status_code == 401
    assert client.get("/login?key=guess").status_code == 403
    assert client.get("/login").status_code == 403
    first = client.get(f"/login?key={links.key}")
    assert first.status_code == 200 and "url=/mlflow/#/experiments/1" in first.text
    assert first.headers["set-cookie"].startswith(f"{UI_COOKIE}=") and UI_COOKIE != COOKIE
    assert "HttpOnly" in first.headers["set-cookie"] and "SameSite=Strict" in first.headers["set-cookie"]
    assert client.get("/").status_code == 303  # with the cookie
    stranger = TestClient(Guard(links, visitors), base_url="http://127.0.0.1:5000", follow_redirects=False)
    assert stranger.get("/login?key=None").status_code == 403 and stranger.get("/login?key=").status_code == 403
    assert stranger.get("/", cookies={UI_COOKIE: "x" * 43}).status_code == 401
    assert stranger.get("/login", headers={"host": "evil.example"}).status_code == 403


def test_killed_mlflow_comes_back(shown: tuple[str, str, int], cookie: str) -> None:
    base, _, process = shown
    children = ps("-o", "pid=,args=", "--ppid", str(process)).splitlines()
    (mlflow,) = [int(child.split()[0]) for child in children if "paretune.tracking.mlflow.app" in child]
    os.kill(mlflow, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while (found := status(f"{base}/mlflow/version", cookie)) != 200:
        assert found == 503 and time.monotonic() < deadline
        time.sleep(0.2)
    assert "paretune.tracking.mlflow.app" not in ps("-o", "args=", "-p", str(mlflow))


def test_the_page_needs_the_link(shown: tuple[str, str, int], cookie: str) -> None:
    """The real thing: no answer without the link, MLflow's with it, no assistant either way."""
    base, _, _ = shown
    assert [status(f"{base}{path}") for path in ("/", "/mlflow/", "/mlflow/version", "/v1/health")] == [
        401,
        401,
        401,
        404,
    ]
    assert status(f"{base}/mlflow/", cookie) == 200
    assert status(f"{base}/mlflow/ajax-api/2.0/mlflow/experiments/search?max_results=5", cookie) == 200
    found = status(f"{base}/mlflow/ajax-api/2.0/mlflow/runs/search", cookie, b'{"experiment_ids": ["1"]}')
    assert found == 200
    assert status(f"{base}/mlflow/ajax-api/3.0/mlflow/assistant/config", cookie) == 404
    assert status(f"{base}/mlflow/ajax-api/2.0/mlflow/experiments/create", cookie, b'{"name": "x"}') == 404


def test_nobody_else_can_enter_the_folder_of_the_socket(shown: tuple[str, str, int]) -> None:
    with_socket = [path for path in sockets_of(shown[2]) if path.name == "mlflow"]
    assert with_socket and all(path.parent.stat().st_mode & 0o077 == 0 for path in with_socket)


def sockets_of(process: int) -> list[Path]:
    """Paths of Unix sockets that the processes of a session listen at."""
    mine = {int(line.split()[0]) for line in ps("-o", "pid=", "--ppid", str(process)).splitlines()}
    commands = "\n".join(ps("-o", "args=", "-p", str(child)) for child in mine)
    return [Path(word) for word in commands.split() if word.startswith("/") and Path(word).is_socket()]


def ps(*arguments: str) -> str:
    return subprocess.run(["ps", "-ww", *arguments], capture_output=True, text=True, check=False).stdout


def status(url: str, cookie: str = "", body: bytes | None = None) -> int:
    headers = {"Cookie": cookie, "Content-Type": "application/json"} if body is not None else {"Cookie": cookie}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def opened(base: str, key: str) -> str:
    """The cookie that the printed link gives."""
    try:
        with urllib.request.urlopen(f"{base}/login?key={key}", timeout=30) as answer:
            return str(answer.headers["set-cookie"]).partition(";")[0]
    except urllib.error.HTTPError as error:
        raise AssertionError("the link led nowhere") from error


@pytest.fixture(scope="module")
def cookie(shown: tuple[str, str, int]) -> str:
    return opened(*shown[:2])


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, int]]:
    """`paretune ui` over a home with an empty database of MLflow: its address, the key of its link, its process."""
    import mlflow

    from paretune.tracking.mlflow.paths import database_uri

    home = tmp_path_factory.mktemp("shown")
    mlflow.MlflowClient(database_uri(home)).create_experiment(
        "paretune", artifact_location=(home / "artifacts").as_uri()
    )
    log = home / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "paretune", "ui", "--home", str(home), "--port", "0"],
            stdout=out,
            stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 120
        while (
            found := re.search(r"(http://127\.0\.0\.1:\d+)/login\?key=(\S+)", log.read_text(encoding="utf8"))
        ) is None:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text(encoding="utf8")
            time.sleep(0.2)
        yield found[1], found[2], process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0
    finally:
        process.kill()
