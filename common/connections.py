"""Connections of a server, the agent's and the service's: how many there may be, and how long one may make the server wait.

A connection either waits for its client (for the header of a request, or for the client to read) or works on a request. A wait
has a deadline. Where there is no room for a new connection, the one that waits longest gives way, among those of the same
address if that has too many, so that clients which connect and say nothing keep nobody out. One that works never gives way.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import Counter
from collections.abc import Callable

HEAD_S = 10.0  # from the connection to the end of its first request's header
IDLE_S = 30.0  # from an answer to the end of the next request's header


class Connection:
    """One connection of `Connections`, which is told what it does. `close` ends it from any thread and returns at once."""

    def __init__(self, owner: Connections, address: str, close: Callable[[], None]) -> None:
        self.owner, self.address, self.close = owner, address, close
        self.since, self.deadline, self.gives_way = 0.0, float("inf"), False

    def wait(self, seconds: float, gives_way: bool = True) -> None:
        """The client has `seconds` for what is expected of it now; with `gives_way` a new connection may take the place."""
        self.since = self.owner.clock()
        self.deadline, self.gives_way = self.since + seconds, gives_way

    def work(self) -> None:
        """The client has done what was expected."""
        self.deadline, self.gives_way = float("inf"), False

    def leave(self) -> None:
        """It has ended."""
        with self.owner.lock:
            self.owner.known.discard(self)


class Connections:
    """At most `most` at a time and `per_address` of one address (an IPv6 network of 64 bits counts as one).

    `is_proxy` tells addresses that stand for many clients and have no limit of their own. Thread-safe; `clock` is in seconds.
    """

    def __init__(
        self,
        most: int,
        per_address: int,
        is_proxy: Callable[[str], bool] = lambda _: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self.per_address, self.is_proxy, self.clock = most, per_address, is_proxy, clock
        self.known: set[Connection] = set()
        self.lock = threading.Lock()

    def enter(self, address: str, close: Callable[[], None]) -> Connection | None:
        """A place for a new connection, which has HEAD_S for its header; None if there is none and no other gives way."""
        place = Connection(self, client_of(address), close)
        place.wait(HEAD_S)
        leaving: Connection | None = None
        with self.lock:
            own = [other for other in self.known if other.address == place.address]
            if len(own) >= self.per_address and not self.is_proxy(address):
                leaving = _longest_waiting(own)
            elif len(self.known) >= self.most:
                leaving = self._of_the_greediest()
            else:
                self.known.add(place)
                return place
            if leaving is None:
                return None
            self.known.discard(leaving)
            self.known.add(place)
        leaving.close()
        return place

    def _of_the_greediest(self) -> Connection | None:
        """The longest waiting connection of the address that has the most of them."""
        waiting = [other for other in self.known if other.gives_way]
        counts = Counter(other.address for other in waiting)
        most = max(counts.values(), default=0)
        return _longest_waiting([other for other in waiting if counts[other.address] == most])

    def close_overdue(self) -> None:
        """End the connections whose deadline is over. To be called every second or more often."""
        moment = self.clock()
        with self.lock:
            overdue = [place for place in self.known if place.deadline <= moment]
            self.known.difference_update(overdue)
        for place in overdue:
            place.close()


def _longest_waiting(places: list[Connection]) -> Connection | None:
    return min((place for place in places if place.gives_way), key=lambda place: place.since, default=None)


def client_of(address: str) -> str:
    """What counts as one client: an IPv4 address, also one written in IPv6, or an IPv6 network of 64 bits."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
