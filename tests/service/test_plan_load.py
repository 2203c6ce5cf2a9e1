"""Slow work does not hold up the rest: plans are made one at a time, and health has a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from paretune.common.errors import EnvironmentProblem
from paretune.service.data import Studies
from paretune.service.queue.job import Busy
from paretune.service.queue.queue import Queue
from paretune.service.server.app import create_app
from paretune.service.state import Service
from paretune.service.work import OneAtATime, Quick

TOKEN = "t" * 32


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    queue = Queue(tmp_path)
    app = create_app(Service(tmp_path, Studies(tmp_path), queue, TOKEN))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(app, base_url="http://127.0.0.1:8765", headers=headers) as found:
        yield found
    queue.close()


def test_a_second_plan_is_refused_and_health_answers(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """45 plans at once kept every thread: health took 4.8 s."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(*_: Any) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(120)
        return {"budget_s": 1}

    monkeypatch.setattr("paretune.service.api.searches.planned", slow)

    def plan(_: int = 0) -> Any:
        return client.post("/v1/plan", json={"spec": {}})

    with ThreadPoolExecutor(46) as many:
        first = many.submit(plan)
        assert begun.wait(120)
        others = list(many.map(plan, range(45)))
        start = time.monotonic()
        assert client.get("/v1/health").json()["status"] == "ok"
        assert time.monotonic() - start < 4
        go_on.set()
        assert first.result(120).json() == {"budget_s": 1}
    assert {answer.status_code for answer in others} == {429}
    assert all(answer.headers["retry-after"] == "2" and "one plan" in answer.json()["error"] for answer in others)
    assert plan().status_code == 200, "the next one is made"


def test_a_plan_that_fails_frees_its_place(client: TestClient) -> None:
    for _ in range(3):
        assert client.post("/v1/plan", json={"spec": {"budget": "never"}}).status_code == 422


def test_health_has_a_thread_of_its_own(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 40 threads that routes share read a slow disk."""
    go_on, inside = threading.Event(), threading.Semaphore(0)

    def slow(*_: Any, **__: Any) -> list[str]:
        inside.release()
        assert go_on.wait(120)
        return []

    monkeypatch.setattr("paretune.service.api.studies.known_profiles", slow)
    with ThreadPoolExecutor(40) as many:
        waiting = [many.submit(client.get, "/v1/profiles") for _ in range(40)]
        assert all(inside.acquire(timeout=120) for _ in range(40))
        assert client.get("/v1/health").status_code == 200
        go_on.set()
        assert {answer.result(120).status_code for answer in waiting} == {200}


def test_work_that_was_taken_back_frees_its_place() -> None:
    async def both() -> None:
        plans, go_on = OneAtATime("plan"), threading.Event()
        running = asyncio.create_task(plans.run(lambda: go_on.wait(120)))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await plans.run(lambda: None)
        running.cancel()
        go_on.set()
        for _ in range(100):
            await asyncio.sleep(0.02)
            try:
                assert await plans.run(lambda: 3) == 3
                return
            except Busy:
                continue
        raise AssertionError("the place was never freed")

    asyncio.run(both())


def test_health_that_cannot_be_read_is_said() -> None:
    async def look() -> None:
        go_on = threading.Event()
        with pytest.raises(EnvironmentProblem, match="within"):
            await Quick("the queue", 0.05).run(lambda: go_on.wait(120))
        go_on.set()

    asyncio.run(look())
