"""A measuring service for other machines: `paretune agent`. The standard library's HTTP server, ids and digests, never paths.

    GET    /v1/health               what this machine is and whether it is busy
    HEAD   /v1/artifacts/SHA256     whether a file is here
    PUT    /v1/artifacts/SHA256     take a file (application/octet-stream)
    POST   /v1/measurements         order a measurement (JSON, order.py); answers with its id
    GET    /v1/measurements/ID      queued, running, done with measurements, or failed with a reason
    DELETE /v1/measurements/ID      cancel it

Every request needs the token and a Host that is this agent's; one with an Origin comes from a web page and is refused.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from paretune.common.agent_access import host_is_known, host_problem, token_matches
from paretune.common.connections import IDLE_S, Connection, Connections
from paretune.objectives.agent.jobs import Job, Jobs, TooMany, Unknown
from paretune.objectives.agent.order import Order
from paretune.objectives.agent.store import ContentStore, Full, WrongChecksum

MOST_JSON = 64 * 1024
MOST_CONNECTIONS, PER_ADDRESS = 32, 24
SOCKET_TIMEOUT_S = 30.0
BODY_S, LEAST_BYTES_PER_S = 30.0, 32 * 1024
DRAINED = 64 * 2**20
ARTIFACT, MEASUREMENT = re.compile(r"/v1/artifacts/([0-9a-f]{64})"), re.compile(r"/v1/measurements/([a-z0-9-]{1,64})")


class Refusal(Exception):
    """A request that is refused: the HTTP status, the rule with the value, and what else the client should know."""

    def __init__(self, status: int, problem: str, **more: Any) -> None:
        super().__init__(problem)
        self.status, self.told = status, {"error": problem, **more}


@dataclass(frozen=True)
class Agent:
    """What the server serves. `facts` is told by health; `allowed_hosts` are further names that clients may call it by."""

    store: ContentStore
    jobs: Jobs
    token: str
    facts: dict[str, Any]
    allowed_hosts: frozenset[str] = frozenset()
    instance: str = field(default_factory=lambda: uuid.uuid4().hex)

    def health(self) -> dict[str, Any]:
        """Return the body of /v1/health: instance, load, size limits in bytes, and `facts`."""
        busy, queued = self.jobs.counts()
        limits = {"max_artifact_bytes": self.store.max_bytes, "max_json_bytes": MOST_JSON}
        return {
            "service": "paretune-agent",
            "instance": self.instance,
            "busy": busy,
            "queued": queued,
            **limits,
            **self.facts,
        }


class AgentServer(ThreadingHTTPServer):
    """A thread per connection. Connections that owe a header or a body for too long are shut down, which ends the thread's wait
    for them; so are those that give way to a new one."""

    daemon_threads = True
    request_queue_size = 128  # beyond it a client waits a second or more for its next try

    def __init__(self, address: tuple[str, int], agent: Agent) -> None:
        self.agent = agent
        self.connections = Connections(MOST_CONNECTIONS, PER_ADDRESS)
        self._places: dict[Any, Connection] = {}
        super().__init__(address, Handler)

    def place_of(self, request: Any) -> Connection:
        """Return the place that a connection holds. Raises KeyError once it has ended."""
        return self._places[request]

    def service_actions(self) -> None:
        """Called by `serve_forever` at least every half second."""
        self.connections.close_overdue()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a new connection a place and a thread; close it where no place is free."""
        place = self.connections.enter(client_address[0], lambda: _shut_down(request))
        if place is None:
            self.shutdown_request(request)
            return
        self._places[request] = place
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """The end of every connection."""
        if (place := self._places.pop(request, None)) is not None:
            place.leave()
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no event; anything else is a bug and is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _shut_down(request: socket.socket) -> None:
    """End a connection from another thread; the one that reads from it sees its end."""
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: AgentServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "paretune-agent", ""
    timeout = SOCKET_TIMEOUT_S
    error_message_format, error_content_type = '{"error": "this is no request that an agent takes"}', "application/json"

    def setup(self) -> None:
        """Open the connection's streams and look up its place, which holds its deadlines."""
        super().setup()
        self.place = self.server.place_of(self.request)

    def handle_one_request(self) -> None:
        """Serve one request, then give the client IDLE_S seconds to send the next one."""
        super().handle_one_request()
        self.place.wait(IDLE_S)

    def parse_request(self) -> bool:
        """Reads the header."""
        understood = super().parse_request()
        self.place.work()
        return understood

    def do_GET(self) -> None:
        """Answer a request; HEAD, PUT, POST and DELETE come here too."""
        self._answer()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        """Nothing from the wire reaches the terminal but method and status, and polling is not told at all."""

    def _answer(self) -> None:
        self._left = 0
        try:
            self._require_access()
            status, told = self._route()()
        except Refusal as refusal:
            status, told = refusal.status, refusal.told
            self.close_connection = True
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        if self.command not in ("GET", "HEAD") or status >= 400:
            sys.stderr.write(f"{self.command} {status}\n")
        self._send(status, told)

    def _require_access(self) -> None:
        """Raises Refusal: 400, 401, 403, 411, 413."""
        agent, (address, port) = self.server.agent, self.connection.getsockname()[:2]
        host = self._single("Host")
        if not host_is_known(host, address, port, agent.allowed_hosts):
            problem, remedy = host_problem(host, "start the agent with --allow-host")
            raise Refusal(403, problem, remedy=remedy)
        if self.headers.get("Origin") is not None or self.headers.get("Sec-Fetch-Site") not in (None, "none"):
            raise Refusal(403, "an agent does not answer web pages")
        if not token_matches(self._single("Authorization"), agent.token):
            raise Refusal(401, "a request needs `Authorization: Bearer` and this agent's token")
        length = self._single("Content-Length") or "0"
        if self.headers.get("Transfer-Encoding") is not None:
            raise Refusal(411, "a body needs a Content-Length; other transfer encodings are not taken")
        if not re.fullmatch(r"[0-9]{1,15}", length):
            raise Refusal(400, "Content-Length must be a number of bytes")
        self._left = int(length)
        self.place.wait(BODY_S + self._left / LEAST_BYTES_PER_S, gives_way=False)

    def _single(self, name: str) -> str | None:
        """The header of this name. Raises Refusal where it comes twice."""
        found = self.headers.get_all(name, [])
        if len(found) > 1:
            raise Refusal(400, f"{name} must come once, but came {len(found)} times")
        return found[0] if found else None

    def _route(self) -> Callable[[], tuple[int, dict[str, Any]]]:
        whole = {("GET", "/v1/health"): self._health, ("POST", "/v1/measurements"): self._order}
        if found := whole.get((self.command, self.path)):
            return found
        if match := ARTIFACT.fullmatch(self.path):
            methods: dict[str, Any] = {"HEAD": self._has, "PUT": self._take}
        elif match := MEASUREMENT.fullmatch(self.path):
            methods = {"GET": self._state, "DELETE": self._cancel}
        else:
            raise Refusal(404, "there is nothing here")
        if self.command not in methods:
            raise Refusal(405, f"{self.command} must be one of {', '.join(methods)} here")
        return lambda: methods[self.command](match[1])

    def _health(self) -> tuple[int, dict[str, Any]]:
        return 200, self.server.agent.health()

    def _has(self, digest: str) -> tuple[int, dict[str, Any]]:
        return (404 if self.server.agent.store.path(digest) is None else 200), {}

    def _take(self, digest: str) -> tuple[int, dict[str, Any]]:
        agent, length = self.server.agent, self._left
        self._require_type("application/octet-stream")
        if length > agent.store.max_bytes:
            raise Refusal(413, f"a file has at most {agent.store.max_bytes:,} bytes, but this one has {length:,}")
        if agent.store.path(digest) is None:
            try:
                agent.store.put(digest, self.rfile, length, agent.jobs.needed())  # type: ignore[arg-type]
                self._left = 0
            except WrongChecksum as error:
                self._left = 0
                raise Refusal(422, str(error)) from None
            except Full as error:
                self._drain()
                raise Refusal(507, str(error)) from None
        self._drain()
        return 200, {"digest": digest}

    def _order(self) -> tuple[int, dict[str, Any]]:
        data = self._json()
        try:
            order = Order.from_dict(data)
            most = self.server.agent.facts["cores"]
            if order.threads > most:
                raise ValueError(f"threads must be at most {most} on this machine, but got {order.threads}")
            if order.engine not in self.server.agent.facts["engines"]:
                raise ValueError(f"engine must be one that is installed there, but got {order.engine}")
        except ValueError as error:
            raise Refusal(422, str(error)) from None
        try:
            return 202, self.server.agent.jobs.submit(order).to_dict()
        except Unknown as error:
            raise Refusal(
                409, "all files of an order must be here; send the missing ones", missing=list(error.args)
            ) from None
        except TooMany as error:
            raise Refusal(429, str(error)) from None

    def _state(self, name: str) -> tuple[int, dict[str, Any]]:
        return 200, self._known(self.server.agent.jobs.get(name)).to_dict()

    def _cancel(self, name: str) -> tuple[int, dict[str, Any]]:
        return 200, self._known(self.server.agent.jobs.cancel(name)).to_dict()

    def _known(self, job: Job | None) -> Job:
        if job is None:
            raise Refusal(404, "unknown job: it is too old, or the agent was started anew since; order again")
        return job

    def _json(self) -> Any:
        self._require_type("application/json")
        if self._left > MOST_JSON:
            raise Refusal(413, f"a JSON body has at most {MOST_JSON:,} bytes, but this one has {self._left:,}")
        data = self.rfile.read(self._left)
        self._left = 0
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise Refusal(400, "the body must be one JSON document in UTF-8") from None

    def _require_type(self, wanted: str) -> None:
        given = (self._single("Content-Type") or "").partition(";")[0].strip().lower()
        if given != wanted:
            raise Refusal(415, f"Content-Type must be {wanted} here")

    def _drain(self) -> None:
        """Read what a known client still sends, so that it comes to read the answer."""
        self._left = min(self._left, DRAINED)
        while self._left and (data := self.rfile.read(min(self._left, 1 << 16))):
            self._left -= len(data)

    def _send(self, status: int, told: dict[str, Any]) -> None:
        body = json.dumps(told).encode()
        self.close_connection = self.close_connection or bool(self._left)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "0" if self.command == "HEAD" else str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def bind(host: str, port: int, agent: Agent) -> AgentServer:
    """A server that listens. Raises OSError; `port` 0 takes a free one."""
    socket.getaddrinfo(host, port, socket.AF_INET)  # a name that does not resolve is said before anything is bound
    return AgentServer((host, port), agent)
