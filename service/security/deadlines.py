"""uvicorn with deadlines: it has none for a connection that sends nothing, one byte a second, or reads no answer.

`Timed` is uvicorn's h11 protocol and tells `Connections` (common/connections.py) what its client owes: the header of a
request, or reading what was sent. `TimedServer` ends the overdue ones at uvicorn's own tick, ten times a second. The
body has its deadline in guard.py. Both rely on uvicorn's `cycle`, `on_response_complete` and `on_tick`;
tests/common/test_connections.py fails if uvicorn drops them.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from paretune.common.connections import IDLE_S, Connection, Connections

MOST_CONNECTIONS, PER_ADDRESS = 256, 128
READ_S = 30.0  # for the client to read the 48 kB between the transport's high and low water
MOST_HEADER = 64 * 1024
GRACE_S = 5


def server_of(app: Any, is_proxy: Callable[[str], bool] = lambda _: False) -> uvicorn.Server:
    """A server of the application with deadlines and limits; `is_proxy` tells addresses that have no limit of their own."""
    connections = Connections(MOST_CONNECTIONS, PER_ADDRESS, is_proxy)

    class Protocol(Timed):
        places = connections

    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level="error",  # its warnings are one line per bad request, for anybody to fill the log with
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,  # security.py reads them, of trusted peers only
        timeout_keep_alive=int(IDLE_S),
        timeout_graceful_shutdown=GRACE_S,
        h11_max_incomplete_event_size=MOST_HEADER,
    )
    return TimedServer(config, connections)


class TimedServer(uvicorn.Server):
    """Ends connections that are overdue."""

    def __init__(self, config: uvicorn.Config, places: Connections) -> None:
        super().__init__(config)
        self.places = places

    async def on_tick(self, counter: int) -> bool:
        """Close overdue connections; return whether uvicorn must end the server."""
        self.places.close_overdue()
        return await super().on_tick(counter)


class Timed(H11Protocol):
    """One connection. It waits for its client until a header is complete, after an answer, and while the client reads none."""

    places: Connections
    place: Connection | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place for the connection; where none is free, answer 503 and close it."""
        super().connection_made(transport)
        self.place = self.places.enter(str((self.client or ("", 0))[0]), transport.abort)
        if self.place is None:
            transport.write(answer(503, "all connections of this address are in use", "close some, or wait a minute"))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        super().connection_lost(exc)
        if self.place is not None:
            self.place.leave()

    def data_received(self, data: bytes) -> None:
        """Read what arrived; a request that is complete ends the client's deadline."""
        if self.place is not None:
            super().data_received(data)
            self._look()

    def on_response_complete(self) -> None:
        """Give the client IDLE_S seconds for its next request, unless that has arrived already."""
        super().on_response_complete()
        if self.place is not None and (self.cycle is None or self.cycle.response_complete):
            self.place.wait(IDLE_S)

    def pause_writing(self) -> None:
        """Give the client READ_S seconds to read what was sent."""
        super().pause_writing()
        if self.place is not None:
            self.place.wait(READ_S)

    def resume_writing(self) -> None:
        """End the deadline for reading if the answer is not yet complete."""
        super().resume_writing()
        self._look()

    def _look(self) -> None:
        """A request that is answered owes nothing, whatever it still sends; what follows an answer has its deadline already."""
        working = self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused
        if self.place is not None and working:
            self.place.work()

    def _should_upgrade(self) -> bool:
        return False

    def send_400_response(self, msg: str) -> None:
        """In JSON as all else, and with the reason where it is a header that is too long."""
        too_long = getattr(sys.exc_info()[1], "error_status_hint", 400) == 431
        if too_long:
            rule = f"a request's header has at most {MOST_HEADER:,} bytes"
            told = answer(431, rule, "delete the cookies of this address in the browser")
        else:
            told = answer(400, "this is no HTTP request that is understood", "")
        self.transport.write(told)
        self.transport.close()


def answer(status: int, problem: str, remedy: str) -> bytes:
    """A whole HTTP answer, after which the connection ends."""
    body = json.dumps({"error": problem, "remedy": remedy}).encode()
    words = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}[status]
    head = (
        f"HTTP/1.1 {status} {words}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "x-content-type-options: nosniff\r\ncache-control: no-store\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
