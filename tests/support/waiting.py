"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait(condition: Callable[[], Any], seconds: float = 300, what: str = "it") -> Any:
    """The first true value of `condition`, for which a slow and busy machine gets time. Raises AssertionError if there is none."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen in {seconds} s")
