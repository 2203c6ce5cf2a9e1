"""`paretune ui`: MLflow's page on a port of the loopback, for whoever holds the link that is printed, once."""

from __future__ import annotations

import contextlib
import hmac
import html
import secrets
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from paretune.service.security.guard import Guard
from paretune.service.security.sessions import SESSION_S, UI_COOKIE, Sessions
from paretune.service.server.mlflow_page import MlflowProxy, mlflow_process
from paretune.service.server.serve import bind, ended_by_signals
from paretune.tracking.mlflow.addresses import require_database, start_page
from paretune.tracking.mlflow.app import PREFIX

if TYPE_CHECKING:
    from paretune.service.security.guard import Receive, Scope, Send

SPENT = "this link was used already, or is not the one that was printed: start the command again for a new one"


@dataclass(frozen=True)
class Visitors:
    """What the guard asks: the only way in is a session."""

    token: str = field(default_factory=lambda: secrets.token_urlsafe(32))  # known to nobody
    allowed_hosts: frozenset[str] = frozenset()
    sessions: Sessions = field(default_factory=Sessions)

    def is_proxy(self, address: str) -> bool:
        """Always False: there is no proxy on the loopback."""
        return False


class OneLink:
    """GET /login?key=KEY opens a session and leads to `page`, once; GET / leads there, too. The rest is not found."""

    def __init__(self, visitors: Visitors, page: str) -> None:
        self.visitors, self.page = visitors, page
        self.key: str | None = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/" and scope["method"] == "GET":
            await _say(send, 303, "", [(b"location", self.page.encode())])
        elif scope["path"] != "/login" or scope["method"] != "GET":
            await _say(send, 404, f"there is nothing here; MLflow is at {PREFIX}/")
        elif not self._opens(parse_qs(scope.get("query_string", b"").decode("latin-1")).get("key", [""])[0]):
            await _say(send, 403, SPENT)
        else:
            cookie = (
                f"{UI_COOKIE}={self.visitors.sessions.begin()}; Path=/; Max-Age={SESSION_S}; HttpOnly; SameSite=Strict"
            )
            # A page, not a redirect: the browser sends the strict cookie also if the link was clicked on another site's page.
            page = f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(self.page)}"><title>MLflow</title>'
            await _say(send, 200, page, [(b"set-cookie", cookie.encode())], b"text/html; charset=utf-8")

    def _opens(self, given: str) -> bool:
        if self.key is None or not hmac.compare_digest(given.encode(), self.key.encode()):
            return False
        self.key = None
        return True


def serve_ui(home: Path, port: int) -> int:
    """Serve MLflow on http://127.0.0.1:`port` until Ctrl-C or SIGTERM; returns the exit status, 0 if so ended.

    To be called in the main thread. Raises UsageError if nothing was recorded in `home` yet, EnvironmentProblem if the
    port is taken or MLflow does not come up.
    """
    from paretune.service.security.deadlines import server_of

    require_database(home)
    with contextlib.ExitStack() as stack:
        listening = bind("127.0.0.1", port)
        stack.callback(listening.close)
        path = stack.enter_context(mlflow_process(home))
        visitors = Visitors()
        links = OneLink(visitors, start_page(home, PREFIX + "/"))
        server = server_of(Guard(MlflowProxy(links, path, inline_scripts=True), visitors), visitors.is_proxy)
        server.capture_signals = lambda: ended_by_signals(server)  # type: ignore[method-assign]
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        print(f"MLflow shows {home} at {address}/login?key={links.key}", file=sys.stderr)
        print("(the link opens once; end with Ctrl-C)", file=sys.stderr, flush=True)
        server.run(sockets=[listening])
    return 0


async def _say(
    send: Send,
    status: int,
    words: str,
    headers: list[tuple[bytes, bytes]] | None = None,
    kind: bytes = b"text/plain; charset=utf-8",
) -> None:
    body = words.encode()
    start = [*(headers or []), (b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
