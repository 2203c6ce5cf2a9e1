"""Who may talk to the service, and how much: pure ASGI, before any route is looked at.

In this order: size of the header, Host (DNS rebinding), Origin and Sec-Fetch-Site (other sites' pages), rate, method and type of
writes, size of the body, then the token or the session's cookie. No CORS at all. The cookie holds a key derived from the token, so
that reading one never shows the other.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from paretune.objectives.agent_access import host_is_known, token_matches
from paretune.service.state import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "paretune_session"
MOST_BODY, MOST_QUERY = 256 * 1024, 4096
BODY_S = 15.0
REQUESTS_PER_S, BURST = 200.0, 400.0
LOGINS_PER_S, LOGIN_BURST = 0.5, 10.0
MOST_CLIENTS = 1000
READS = ("GET", "HEAD")
OPEN = ("/login", "/v1/health")
OPEN_FOLDER = "/static/"
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        b"connect-src 'self'; font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Buckets:
    """A bucket of requests per client address: `rate` a second, `burst` at once. The oldest clients are forgotten."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.clock = rate, burst, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str) -> bool:
        """Whether the client has one left."""
        with self._lock:
            moment = self.clock()
            left, since = self._left.pop(client, (self.burst, moment))
            left = min(self.burst, left + (moment - since) * self.rate)
            self._left[client] = (max(0.0, left - 1), moment)
            while len(self._left) > MOST_CLIENTS:
                self._left.popitem(last=False)
            return left >= 1


class Refused(Exception):
    """An answer before any route: status, rule, remedy."""

    def __init__(self, status: int, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.status, self.problem, self.remedy = status, problem, remedy


class Guard:
    """Wraps an application; every answer, refusals too, gets the security headers."""

    def __init__(self, app: App, service: Service) -> None:
        self.app, self.service = app, service
        self.requests, self.logins = Buckets(REQUESTS_PER_S, BURST), Buckets(LOGINS_PER_S, LOGIN_BURST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no WebSocket is served
            await send({"type": "websocket.close", "code": 1008})
            return
        guarded = _with_headers(scope, send)
        try:
            self.admit(scope)
            whole = await _body(scope, receive)
        except Refused as refused:
            await _refuse(scope, guarded, refused)
            return
        await self.app(scope, whole, guarded)

    def admit(self, scope: Scope) -> None:
        """Raises Refused: 400, 401, 403, 405, 413, 414, 415, 429."""
        headers = Headers(scope)
        path, method = str(scope["path"]), str(scope["method"])
        if len(scope.get("query_string", b"")) > MOST_QUERY or len(scope.get("raw_path") or b"") > MOST_QUERY:
            raise Refused(414, f"path and query have at most {MOST_QUERY} bytes")
        address, port = (scope.get("server") or ("127.0.0.1", 0))[:2]
        if not host_is_known(headers.single("host"), str(address), int(port or 0), self.service.allowed_hosts):
            raise Refused(403, "the Host header must be this service's own address, or a name given by --allow-host")
        self._require_own_site(headers, method)
        client = str((scope.get("client") or ("", 0))[0])
        if not self.requests.take(client):
            raise Refused(429, f"a client sends at most {REQUESTS_PER_S:.0f} requests per second", "wait a second")
        if path == "/login" and method == "POST" and not self.logins.take(client):
            raise Refused(429, "too many logins", "wait some seconds")
        if method not in READS:
            _require_json(headers, method)
        if not _is_open(path) and not self.is_known(headers):
            raise Refused(401, "a request needs `Authorization: Bearer TOKEN`, or the cookie of /login", "log in")

    def is_known(self, headers: Headers) -> bool:
        """Whether the token or the cookie is right; either check takes the same time wherever it differs."""
        if token_matches(headers.single("authorization"), self.service.token):
            return True
        try:
            cookie = SimpleCookie(headers.single("cookie") or "").get(COOKIE)
        except CookieError:
            return False
        given = "" if cookie is None else cookie.value
        return hmac.compare_digest(given.encode("utf8", "replace"), session_key(self.service.token).encode())

    def _require_own_site(self, headers: Headers, method: str) -> None:
        origin, site = headers.single("origin"), headers.single("sec-fetch-site")
        if origin is not None and origin.lower().partition("://")[2] != (headers.single("host") or "").lower():
            raise Refused(403, "a page of another site may not talk to this service")
        navigation = method in READS and headers.single("sec-fetch-mode") == "navigate"
        if site not in (None, "none", "same-origin") and not navigation:
            raise Refused(403, "a page of another site may not talk to this service")


class Headers:
    """A request's headers, of which those that decide must come once."""

    def __init__(self, scope: Scope) -> None:
        self._found = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]

    def single(self, name: str) -> str | None:
        found = [value for key, value in self._found if key == name]
        if len(found) > 1:
            raise Refused(400, f"{name} must come once, but came {len(found)} times")
        return found[0] if found else None


def session_key(token: str) -> str:
    """What the cookie holds."""
    return hmac.new(token.encode(), b"paretune session", hashlib.sha256).hexdigest()


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(OPEN_FOLDER)


def _require_json(headers: Headers, method: str) -> None:
    if method not in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
        raise Refused(405, "this method is not served")
    if method != "POST":
        return  # the routes know none of them and say which they have
    given = (headers.single("content-type") or "").partition(";")[0].strip().lower()
    if given != "application/json":
        raise Refused(
            415, "what changes something must be application/json", "send JSON, {} if there is nothing to say"
        )
    length = headers.single("content-length")
    if length is not None and (not length.isdecimal() or int(length) > MOST_BODY):
        raise Refused(413, f"a body has at most {MOST_BODY:,} bytes")


async def _body(scope: Scope, receive: Receive) -> Receive:
    """The whole body, read within BODY_S and MOST_BODY, as a `receive` for the application."""
    if scope["method"] in READS:
        return receive
    import asyncio

    async def read() -> bytes:
        found = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client went away")
            found += message.get("body", b"")
            if len(found) > MOST_BODY:
                raise Refused(413, f"a body has at most {MOST_BODY:,} bytes")
            if not message.get("more_body", False):
                return bytes(found)

    try:
        body = await asyncio.wait_for(read(), BODY_S)
    except TimeoutError:
        raise Refused(408, f"a body must arrive within {BODY_S:.0f} s") from None
    sent = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_headers(scope: Scope, send: Send) -> Send:
    path = str(scope["path"])
    caching = (b"cache-control", b"no-store") if not path.startswith(OPEN_FOLDER) else (b"cache-control", b"no-cache")

    async def guarded(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message["headers"]}
            more = [pair for pair in (*HEADERS, caching) if pair[0] not in own]
            message = {**message, "headers": [*message["headers"], *more]}
        await send(message)

    return guarded


async def _refuse(scope: Scope, send: Send, refused: Refused) -> None:
    """JSON for programs; a browser that is not logged in is led to the login."""
    accepts = next((v.decode("latin-1") for k, v in scope["headers"] if k.lower() == b"accept"), "")
    if (
        refused.status == 401
        and scope["method"] == "GET"
        and "text/html" in accepts
        and not scope["path"].startswith("/v1/")
    ):
        await send(
            {
                "type": "http.response.start",
                "status": 303,
                "headers": [(b"location", b"/login"), (b"content-length", b"0")],
            }
        )
        await send({"type": "http.response.body", "body": b""})
        return
    body = json.dumps({"error": refused.problem, "remedy": refused.remedy}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
