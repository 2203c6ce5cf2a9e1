"""`python -m paretune.tracking.mlflow.app SOCKET PARENT`: MLflow's page for looking, comparing and artifacts, on a Unix socket.

MLflow's server can do far more than show runs: its assistant starts programs, its jobs, webhooks and gateway reach out. So its
application is wrapped, and only what READS lists gets through: a new version's routes are refused until somebody adds them here.
Nobody logs in here. The socket lies in a folder of mode 0700, and whoever hands requests on has checked who sent them.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

PREFIX = "/mlflow"
API, API3 = "/ajax-api/2.0/mlflow/", "/ajax-api/3.0/mlflow/"
SETTLED = "/paretune-settled.js"
# (method, path behind PREFIX): a path is exact, or a pattern for the whole of it.
READS: tuple[tuple[str, str], ...] = (
    ("GET", "/"),
    ("GET", SETTLED),
    ("GET", "/static-files/[A-Za-z0-9_~./-]+"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", f"{API3}server-info"),
    ("GET", f"{API}experiments/get"),
    ("GET", f"{API}experiments/get-by-name"),
    ("GET", f"{API}experiments/search"),
    ("POST", f"{API}experiments/search-datasets"),
    ("POST", "/graphql"),  # reads only, its mutations, too; tests/service/test_mlflow_routes.py knows them by name
    ("POST", f"{API}experiments/search"),
    ("GET", f"{API}runs/get"),
    ("POST", f"{API}runs/search"),
    ("GET", f"{API}metrics/get-history"),
    ("GET", f"{API}metrics/get-history-bulk"),
    ("GET", f"{API}metrics/get-history-bulk-interval"),
    ("GET", f"{API}artifacts/list"),
    ("GET", "/get-artifact"),
    ("GET", "/model-versions/get-artifact"),
    ("GET", f"{API}registered-models/get"),
    ("GET", f"{API}registered-models/search"),
    ("GET", f"{API}registered-models/alias"),
    ("GET", f"{API}registered-models/get-latest-versions"),
    ("POST", f"{API}registered-models/get-latest-versions"),
    ("GET", f"{API}model-versions/get"),
    ("GET", f"{API}model-versions/search"),
    ("GET", f"{API}model-versions/get-download-uri"),
    ("POST", f"{API}logged-models/search"),
    ("GET", f"{API}logged-models/[A-Za-z0-9_-]+"),
    ("GET", f"{API}logged-models/[A-Za-z0-9_-]+/artifacts/directories"),
    ("GET", f"{API}logged-models/[A-Za-z0-9_-]+/artifacts/files"),
)
ALLOWED = tuple((method, re.compile(PREFIX + pattern)) for method, pattern in READS)
# What a visitor would click away: the assistant, which does not answer here, and the notice about telemetry, which is off. The page
# begins on the side for models and asks for no gateway, whose refusal it would show as an error.
SETTLED_SCRIPT = """\
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
localStorage.setItem("mlflow.telemetry.info.alert.dismissed_v1", "true");
if (localStorage.getItem("mlflow.workflowType_v1") === null)
  localStorage.setItem("mlflow.workflowType_v1", '"machine_learning"');
const served = window.fetch;
window.fetch = (asked, ...more) => {
  const url = String(asked instanceof Request ? asked.url : asked);
  if (url.includes("ajax-api/2.0/mlflow/gateway-proxy"))
    return Promise.resolve(new Response('{"endpoints": []}', { headers: { "content-type": "application/json" } }));
  return served.call(window, asked, ...more);
};
"""
WITHOUT_ASSISTANT = "<style>[data-assistant-ui] { display: none !important }</style>"
ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "_MLFLOW_STATIC_PREFIX": PREFIX,
    "_MLFLOW_SERVER_SERVE_ARTIFACTS": "false",
}
# Names only, so that no secret of anybody reaches MLflow, whatever it is called.
INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TEMP|TMP|LD_LIBRARY_PATH|VIRTUAL_ENV|PYTHON\w+|OMP_\w+"
)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_allowed(method: str, path: str, raw_path: bytes) -> bool:
    """Whether a request may reach MLflow. An escaped character, an empty or a dotted part of a path is in none that it needs."""
    if b"%" in raw_path or "//" in path or any(part in (".", "..") for part in path.split("/")):
        return False
    method = "GET" if method == "HEAD" else method
    return any(method == known and pattern.fullmatch(path) for known, pattern in ALLOWED)


class ReadOnly:
    """Wraps MLflow's application: what is not allowed is answered 404, and its start page comes without the assistant."""

    def __init__(self, app: App, page: str) -> None:
        self.app = app
        head = f'{WITHOUT_ASSISTANT}<script src=".{SETTLED}"></script></head>'
        self.own = {
            f"{PREFIX}/": (b"text/html; charset=utf-8", page.replace("</head>", head, 1).encode()),
            PREFIX + SETTLED: (b"text/javascript", SETTLED_SCRIPT.encode()),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not is_allowed(scope["method"], scope["path"], scope.get("raw_path") or scope["path"].encode()):
            message = "this page is for looking, comparing and artifacts: paretune does not serve this route of MLflow"
            body = json.dumps({"error_code": "ENDPOINT_NOT_FOUND", "message": message}).encode()
            await _answer(send, 404, b"application/json", body)
        elif scope["path"] in self.own:
            await _answer(send, 200, *self.own[scope["path"]])
        else:
            await self.app(scope, receive, send)


async def _answer(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def environment_of(home: Path, given: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """The environment of MLflow's process: none of our secrets, no setting of another MLflow."""
    from paretune.tracking.mlflow.paths import artifact_root, database_uri

    inherited = os.environ if given is None else given
    kept = {name: value for name, value in inherited.items() if INHERITED.fullmatch(name)}
    stores = {name: database_uri(home) for name in ("_MLFLOW_SERVER_FILE_STORE", "_MLFLOW_SERVER_REGISTRY_STORE")}
    return kept | ENVIRONMENT | stores | {"_MLFLOW_SERVER_ARTIFACT_ROOT": artifact_root(home)}


def create_app() -> ReadOnly:
    """MLflow's application, wrapped. The environment has to be `environment_of` a home."""
    from mlflow.server import app as flask_app
    from mlflow.server.fastapi_app import app

    page = (Path(str(flask_app.static_folder)) / "index.html").read_text(encoding="utf8")
    return ReadOnly(app, page)


def main(socket: str, parent: str) -> None:
    """Serve on the Unix socket until the parent dies or says SIGTERM."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: never outlive the parent
    if os.getppid() != int(parent):
        raise SystemExit(0)
    import uvicorn

    uvicorn.run(create_app(), uds=socket, log_level="error", access_log=False, server_header=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
