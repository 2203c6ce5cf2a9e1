"""Who may talk to the service, and how much: pure ASGI, before any route is looked at.

In this order: size of the header, Host (DNS rebinding), Origin and Sec-Fetch-Site (other sites' pages), rate, method and type of
writes, then the token or the session's cookie, size of the body. No CORS at all. The client's address is the connection's; what a
proxy says of its client and of TLS (X-Forwarded-For, X-Forwarded-Proto) counts only if the connection is a trusted proxy's.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from paretune.common.agent_access import host_is_known, host_problem, own_hosts, token_matches
from paretune.common.connections import client_of
from paretune.service.security.proxies import forwarded_client, forwarded_scheme
from paretune.service.security.sessions import Sessions, session_names

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BODY, MOST_QUERY = 256 * 1024, 4096
MLFLOW, MLFLOW_QUERY = "/mlflow/", 32 * 1024  # its charts ask for many runs at once
BODY_S = 15.0
REQUESTS_PER_S, BURST = 200.0, 400.0
LOGINS_PER_S, LOGIN_BURST = 0.5, 10.0
MOST_CLIENTS = MOST_WRONG = 1000
UNGUESSABLE = 32  # characters of a token from which no number of tries at REQUESTS_PER_S finds it
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

    def has(self, client: str) -> bool:
        """Whether the client has one left, without taking it."""
        with self._lock:
            left, since = self._left.get(client, (self.burst, 0.0))
            return left + (self.clock() - since) * self.rate >= 1

    def take(self, client: str) -> bool:
        """Whether the client has one left, which is taken."""
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


class Visitors(Protocol):
    """Who may come in: holders of the token, and of a session."""

    @property
    def token(self) -> str:
        """The token that programs send as `Authorization: Bearer`."""

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """Further host names that clients may call the service by."""

    @property
    def sessions(self) -> Sessions:
        """The sessions of browsers that have logged in."""

    def is_proxy(self, address: str) -> bool:
        """Whether the address is that of a trusted proxy."""


class Guard:
    """Wraps an application; every answer, refusals too, gets the security headers."""

    def __init__(self, app: App, service: Visitors) -> None:
        self.app, self.service = app, service
        self.requests, self.logins = Buckets(REQUESTS_PER_S, BURST), Buckets(LOGINS_PER_S, LOGIN_BURST)
        self._wrong: OrderedDict[bytes, None] = OrderedDict()

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
        most_query = MLFLOW_QUERY if path.startswith(MLFLOW) else MOST_QUERY
        if len(scope.get("query_string", b"")) > most_query or len(scope.get("raw_path") or b"") > MOST_QUERY:
            raise Refused(414, f"path and query have at most {most_query} bytes")
        address, port = _local(scope)
        host = headers.single("host")
        if not host_is_known(host, address, port, self.service.allowed_hosts):
            raise Refused(403, *host_problem(host, "start the service with --allow-host"))
        peer = str((scope.get("client") or ("", 0))[0])
        from_proxy = self.service.is_proxy(peer)
        scheme = forwarded_scheme(headers.all("x-forwarded-proto")) if from_proxy else None
        _require_own_site(headers, method, _schemes(scheme, host or "", own_hosts(address, port)))
        client = forwarded_client(peer, headers.all("x-forwarded-for"), self.service.is_proxy) if from_proxy else peer
        client = client_of(client)
        if not self.requests.take(client):
            raise Refused(429, f"a client sends at most {REQUESTS_PER_S:.0f} requests per second", "wait a second")
        if path == "/login" and method == "POST" and not self.logins.take(client):
            raise Refused(429, "too many logins", "wait some seconds")
        if method not in READS:
            _require_json(headers, method)
        if not _is_open(path) and not self._is_known(headers, client, scheme == "https"):
            raise Refused(401, "a request needs `Authorization: Bearer TOKEN`, or the cookie of /login", "log in")

    def _is_known(self, headers: Headers, client: str, secure: bool) -> bool:
        """Whether the token or a session is right; neither check's time tells where it differs. Raises Refused for guesses."""
        given = headers.single("authorization")
        if given is not None and self._token_is_right(given, client):
            return True
        return any(self.service.sessions.knows(name) for name in session_names(headers.all("cookie"), secure))

    def _token_is_right(self, given: str, client: str) -> bool:
        """A wrong token is a login that failed, once: a program that repeats an old one keeps nobody out.

        Who has used up the logins is not told whether a short token, which can be somebody's own word, is right.
        """
        token, tried = self.service.token, hashlib.sha256(given.encode("latin-1", "replace")).digest()
        guarded = len(token) < UNGUESSABLE
        if not (guarded and not self.logins.has(client)) and token_matches(given, token):
            return True
        if tried not in self._wrong and not self.logins.take(client):
            raise Refused(429, "too many wrong tokens", "wait some seconds")
        self._wrong[tried] = None
        while len(self._wrong) > MOST_WRONG:
            self._wrong.popitem(last=False)
        return False


def _local(scope: Scope) -> tuple[str, int]:
    """The address and port that the connection came to."""
    address, port = (scope.get("server") or ("127.0.0.1", 0))[:2]
    return str(address), int(port or 0)


def _schemes(forwarded: str | None, host: str, own: set[str]) -> set[str]:
    """Schemes that the address of one of our own pages can have: what a trusted proxy says; without one the service speaks HTTP,
    but a name can be that of a proxy, which may do TLS."""
    if forwarded is not None:
        return {forwarded}
    return {"http"} if host.lower() in own else {"http", "https"}


def _require_own_site(headers: Headers, method: str, schemes: set[str]) -> None:
    origin, site = headers.single("origin"), headers.single("sec-fetch-site")
    host = (headers.single("host") or "").lower()
    if origin is not None:
        scheme, _, named = origin.lower().partition("://")
        default = {"http": ":80", "https": ":443"}.get(scheme, "")
        if scheme not in schemes or named.removesuffix(default) != host.removesuffix(default):
            raise Refused(403, "a page of another site may not talk to this service")
    navigation = method in READS and headers.single("sec-fetch-mode") == "navigate"
    if site not in (None, "none", "same-origin") and not navigation:
        raise Refused(403, "a page of another site may not talk to this service")


class Headers:
    """A request's headers, of which those that decide must come once."""

    def __init__(self, scope: Scope) -> None:
        self._found = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]

    def single(self, name: str) -> str | None:
        """Return the header's value, None without one. Raises Refused (400) if it comes more than once."""
        found = self.all(name)
        if len(found) > 1:
            raise Refused(400, f"{name} must come once, but came {len(found)} times")
        return found[0] if found else None

    def all(self, name: str) -> list[str]:
        """Return all values of a header in their order; `name` is in lower case."""
        return [value for key, value in self._found if key == name]


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
