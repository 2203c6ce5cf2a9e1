"""A study's progress as server-sent events: one `status` when something has changed, a comment as heartbeat, `end` at the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from paretune.hardware_profiles.errors import ParetuneError
from paretune.service.data import summary
from paretune.service.job import LIVE, shown_state
from paretune.service.state import Service

EVERY_S, HEARTBEAT_S, LONGEST_S = 1.0, 15.0, 3600.0
MOST_STREAMS = 64
LAST_EVENTS = 5


class Streams:
    """How many streams are open; each holds a connection and looks at a store once a second."""

    def __init__(self) -> None:
        self.open = 0

    @property
    def is_full(self) -> bool:
        return self.open >= MOST_STREAMS

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """While a stream is sent: one whose client went away before it began is never counted."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


async def progress(service: Service, study: str, streams: Streams) -> AsyncIterator[str]:
    """The stream of one client. Ends when the study has, or after LONGEST_S: browsers connect again by themselves."""
    loop = asyncio.get_running_loop()
    last, silent, start = "", 0.0, loop.time()
    with streams.one():
        yield "retry: 3000\n\n"
        while loop.time() - start < LONGEST_S:
            data = await asyncio.to_thread(status, service, study)
            text = json.dumps(data, default=str)
            if text != last:
                last, silent = text, 0.0
                yield f"event: status\ndata: {text}\n\n"
            if is_over(data):
                yield "event: end\ndata: {}\n\n"
                return
            await asyncio.sleep(EVERY_S)
            silent += EVERY_S
            if silent >= HEARTBEAT_S:
                silent = 0.0
                yield ": still here\n\n"


def status(service: Service, study: str) -> dict[str, Any]:
    """How the study and its job stand, with the last events; a job that waits has no study yet."""
    job = service.queue.job(study)
    found: dict[str, Any] = {"study": study, "state": shown_state(job, None)}
    try:
        view = service.studies.view(study)
        events = [{"at": e.at, "kind": e.kind, "text": e.text} for e in view.events[-LAST_EVENTS:]]
        told = summary(view)
        found |= {**told, "state": shown_state(job, told["state"]), "events": events}
    except ParetuneError as error:
        found["problem"] = error.problem
    found["job"] = None if job is None else job.to_dict()
    return found


def is_over(data: dict[str, Any]) -> bool:
    """Whether nothing will change any more."""
    return data["state"] in ("complete", "cancelled", "failed") and (
        data["job"] is None or data["job"]["state"] not in LIVE
    )
