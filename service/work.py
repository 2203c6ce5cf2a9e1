"""Threads for what must not wait for, or hold up, everything else.

Routes that are plain functions share one pool of threads. What takes seconds has a pool of its own here, of one thread and without
a queue: a second request is refused at once with the time to come back, instead of keeping a thread that answers others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from paretune.common.errors import EnvironmentProblem
from paretune.service.queue.job import Busy

T = TypeVar("T")


class OneAtATime:
    """Slow work of one kind, called `what` in refusals."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._free = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=what)

    async def run(self, work: Callable[[], T]) -> T:
        """The work's result. Raises Busy if there is one already. A client that goes away does not free the thread early."""
        if not self._free.acquire(blocking=False):
            raise Busy(
                f"one {self.what} is made at a time, and another one is being made", "send it again in some seconds"
            )
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: self._free.release())  # also where it was taken back before it began
        return await asyncio.wrap_future(future)


class Quick:
    """Work of milliseconds that must be answered even when all other threads are busy; it has a thread of its own."""

    def __init__(self, what: str, patience_s: float) -> None:
        self.what, self.patience_s = what, patience_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=what)

    async def run(self, work: Callable[[], T]) -> T:
        """The work's result. Raises EnvironmentProblem if it takes longer than `patience_s`."""
        running = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.wait_for(asyncio.shield(running), self.patience_s)
        except TimeoutError:
            raise EnvironmentProblem(
                f"{self.what} must be read within {self.patience_s:.0f} s, but is not",
                "look at the home's disk, and at what else runs on the machine",
            ) from None
