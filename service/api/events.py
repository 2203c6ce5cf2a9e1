"""Progress of studies as server-sent events: `status` when one has changed, `end` when one will not change any more, a comment as
heartbeat. One stream may follow many studies: a browser has few connections, so its tabs share one (static/shared.js)."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from paretune.common.errors import ParetuneError
from paretune.service.queue.job import LIVE, QueueFull, shown_state
from paretune.service.state import Service

EVERY_S, HEARTBEAT_S, LONGEST_S = 1.0, 15.0, 3600.0
MOST_STREAMS = 64


class Streams:
    """How many streams are open; each holds a connection and looks at its stores once a second."""

    def __init__(self) -> None:
        self.open = 0

    @property
    def is_full(self) -> bool:
        """Whether MOST_STREAMS streams are open."""
        return self.open >= MOST_STREAMS

    def require_room(self) -> None:
        """Raises QueueFull."""
        if self.is_full:
            raise QueueFull(f"at most {MOST_STREAMS} streams are open at a time", "close some")

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Count a stream as open for the block. Enter it when sending begins: the client may leave before that."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


def followed(service: Service, text: str) -> list[str]:
    """The studies of a list with commas. Raises Unknown."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        require_known(service, name)
    return names


def require_known(service: Service, study: str) -> None:
    """Raises Unknown if there is neither a study nor a search of this name."""
    if service.queue.job(study) is None:
        service.studies.known(study)


async def progress(service: Service, studies: Sequence[str], streams: Streams) -> AsyncIterator[str]:
    """The stream of one client. Ends when all studies have, or after LONGEST_S: browsers connect again by themselves."""
    loop = asyncio.get_running_loop()
    last, silent, start = dict.fromkeys(studies, ""), 0.0, loop.time()
    with streams.one():
        yield "retry: 3000\n\n"
        while loop.time() - start < LONGEST_S:
            for study, data in (await asyncio.to_thread(_look, service, list(last))).items():
                text = json.dumps(data, default=str)
                if text != last[study]:
                    last[study], silent = text, 0.0
                    yield f"event: status\ndata: {json.dumps(data | clock(data), default=str)}\n\n"
                if is_over(data):
                    del last[study]
                    yield f"event: end\ndata: {json.dumps({'study': study})}\n\n"
            if not last:
                return
            await asyncio.sleep(EVERY_S)
            silent += EVERY_S
            if silent >= HEARTBEAT_S:
                silent = 0.0
                yield ": still here\n\n"


def _look(service: Service, studies: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {study: status(service, study) for study in studies}


def status(service: Service, study: str) -> dict[str, Any]:
    """How the study and its job stand, with the last events; a job that waits has no study yet."""
    job = service.queue.job(study)
    found: dict[str, Any] = {"study": study, "state": shown_state(job, None)}
    try:
        standing = service.studies.standing(study)
        told, events = standing.told, standing.events
        found |= {**told, "state": shown_state(job, told["state"])}
        found["events"] = [{"at": e.at, "kind": e.kind, "text": e.text} for e in events]
    except ParetuneError as error:
        found["problem"] = error.problem
    found["job"] = None if job is None else job.to_dict()
    return found


def clock(data: dict[str, Any]) -> dict[str, Any]:
    """`elapsed_s`: the budget used at this moment, since searches write it only now and then; and how long a search without a study
    has been starting. Nothing where no time runs."""
    if data.get("spent_s") is not None:
        since, before = data.get("spent_at"), data["spent_s"]
    else:
        job = data.get("job")
        since, before = job["started"] if isinstance(job, dict) else None, 0.0
    if data["state"] not in LIVE or not since:
        return {}
    passed = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(since)).total_seconds()
    return {"elapsed_s": before + max(0.0, passed)}


def is_over(data: dict[str, Any]) -> bool:
    """Whether nothing will change any more."""
    return data["state"] in ("complete", "cancelled", "failed") and (
        data["job"] is None or data["job"]["state"] not in LIVE
    )
