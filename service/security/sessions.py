"""Logins of browsers: random ids that the service keeps in memory, so a logout or the end of the service voids them.

The cookie holds the id and nothing else. The service keeps only its SHA-256, by which it is looked up: how long that takes says
nothing about the id. Behind TLS the cookie has the name `__Host-…` and is Secure, so that no page without TLS can set or see it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

COOKIE = "paretune_session"
SECURE_COOKIE = f"__Host-{COOKIE}"
UI_COOKIE = f"{COOKIE}_ui"  # browsers keep cookies per host, not per port: `paretune ui` must not log its user out of the service
SESSION_S = 7 * 86_400
MOST_SESSIONS, MOST_TRIED = 1000, 64


class Sessions:
    """At most MOST_SESSIONS of them; the oldest goes first. Thread-safe; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._ends: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self) -> str:
        """The id of a new session, which ends after SESSION_S."""
        name = secrets.token_urlsafe(32)
        with self._lock:
            self._ends[_key(name)] = self.clock() + SESSION_S
            while len(self._ends) > MOST_SESSIONS:
                self._ends.popitem(last=False)
        return name

    def knows(self, name: str) -> bool:
        """Whether there is such a session and it has not ended."""
        with self._lock:
            ends = self._ends.get(_key(name))
            if ends is not None and ends <= self.clock():
                del self._ends[_key(name)]
                return False
            return ends is not None

    def end(self, name: str) -> None:
        """Void a session, if there is one."""
        with self._lock:
            self._ends.pop(_key(name), None)


def _key(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf8", "replace")).digest()


def session_names(headers: list[str], secure_only: bool = False) -> list[str]:
    """Session ids in Cookie headers; whatever else is in them, other sites' cookies on the same address, is stepped over.

    `secure_only` leaves out those that a page without TLS could have set.
    """
    names = {SECURE_COOKIE} if secure_only else {COOKIE, SECURE_COOKIE, UI_COOKIE}
    found = []
    for header in headers:
        for part in header.split(";"):
            name, _, value = part.strip(" \t").partition("=")
            value = value.strip(' \t"')
            if name.rstrip(" \t") in names and re.fullmatch(r"[A-Za-z0-9_-]{1,100}", value):
                found.append(value)
    return found[:MOST_TRIED]
