"""SIGINT and SIGTERM during a search."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

from paretune.search.policy.director import Director


@contextlib.contextmanager
def obeyed(director: Director) -> Iterator[None]:
    """First SIGINT or SIGTERM: stop what runs and write up. Second: leave at once (the store is always resumable)."""

    def ask(_number: int, _frame: Any) -> None:
        if director.is_interrupted:
            os._exit(130)
        director.interrupt()

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
