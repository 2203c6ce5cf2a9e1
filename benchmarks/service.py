"""The service under load: latency of answers beside a running search, pages of large studies, submissions, what pages cost a search.

All load goes to this machine's loopback and ends by itself. Searches beside it are the simulated evaluator's (store, Ray and
Optuna are real) or, where a search's own speed is measured, real training on one thread.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Figure, figure
from benchmarks.overhead import fill
from paretune.search.recommend.advice import advise
from paretune.search.recommend.recommend import Limits
from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view

SIMULATED = {
    "PARETUNE_EVALUATOR": "paretune.search.evaluators.simulated:SimulatedEvaluator",
    "PARETUNE_SIMULATED_SLEEP": "0.5",
}
RATE, SECONDS, CLIENTS = 50, 120.0, 100
PAGES = 10
LONG = {"budget": "20m", "fit_points": 8, "max_candidates": 2000, "finalists": 1, "mixed_precision": False}


class Served:
    """`paretune serve` on a home, and requests to it."""

    def __init__(self, home: Path, *options: str, **environment: str) -> None:
        self.home = home
        command = [sys.executable, "-m", "paretune", "serve", "--port", "0", "--home", str(home), *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
            encoding="utf-8",
        )
        assert self.process.stdout is not None
        self.host = self.process.stdout.readline().strip().removeprefix("http://")
        self.headers = {
            "Authorization": f"Bearer {(home / 'service' / 'token').read_text(encoding='utf-8').strip()}",
            "Content-Type": "application/json",
        }

    def ask(self, path: str, data: Any = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        body = None if data is None else json.dumps(data)
        connection.request("GET" if data is None else "POST", path, body, {**self.headers, **headers})
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def wait(self, study: str, condition: Callable[[dict[str, Any]], bool], seconds: float = 120) -> float:
        """Seconds until the study's status keeps the condition."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            status, told = self.ask(f"/v1/studies/{study}")
            if status == 200 and condition(json.loads(told)):
                return time.monotonic() - start
            time.sleep(0.2)
        sys.exit(f"{study} did not get there in {seconds} s: {told[:500]!r}")


@contextmanager
def served(*options: str, home: Path | None = None, **environment: str) -> Iterator[Served]:
    with tempfile.TemporaryDirectory() as folder:
        own = home or Path(folder) / "home"
        own.mkdir(parents=True, exist_ok=True)
        service = Served(own, *options, **environment)
        try:
            yield service
        finally:
            service.process.send_signal(signal.SIGTERM)
            service.process.wait(120)


def get_p95_ms() -> Iterator[Figure]:
    """95th percentile of GET answers at 50 requests a second over two minutes beside a running search; and how many were 5xx."""
    with served(home=None, **SIMULATED) as service:
        service.ask("/v1/studies", {"spec": LONG, "name": "load"})
        service.wait("load", lambda told: told.get("explored", 0) >= 5)
        key = json.loads(service.ask("/v1/studies/load/front")[1])["front"][0]["key"]
        paths = [
            "/v1/studies",
            "/v1/studies/load",
            "/v1/studies/load/front",
            "/v1/studies/load/recommendation?max_loss=0.05",
            f"/v1/studies/load/candidates/{key}",
            "/studies/load",
            "/studies/load/chart",
            "/v1/health",
        ]
        found = at_rate(service, paths, RATE, SECONDS)
    milliseconds = [ms for _, ms in found]
    yield figure(
        "get_p95_ms",
        float(np.quantile(milliseconds, 0.95)),
        "ms",
        float(np.quantile(milliseconds, 0.5)),
        float(np.quantile(milliseconds, 0.99)),
        requests=len(found),
        per_second=RATE,
        server_errors=sum(status >= 500 for status, _ in found),
        others=sum(status != 200 for status, _ in found),
    )


def at_rate(service: Served, paths: list[str], rate: float, seconds: float) -> list[tuple[int, float]]:
    """(status, milliseconds since it was due) of requests that are due at fixed times, so that a slow server is not asked less."""
    start, turn = time.monotonic() + 0.5, itertools.cycle(paths)

    def one(due: float, path: str) -> tuple[int, float]:
        time.sleep(max(0.0, due - time.monotonic()))
        status = service.ask(path)[0]
        return status, 1e3 * (time.monotonic() - due)

    with ThreadPoolExecutor(32) as pool:
        jobs = [pool.submit(one, start + i / rate, next(turn)) for i in range(int(rate * seconds))]
        return [job.result() for job in jobs]


def page_seconds() -> Iterator[Figure]:
    """A study's page with its chart's data, over HTTP, the first time after a start and again: 1,000 and 10,000 candidates."""
    for count in (1000, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder) / "home"
            large_study(home, count)
            with served("--searches", "0", home=home) as service:
                first, again = (_page(service) for _ in range(2))
        yield figure(f"page_seconds_{count}", first, "s", candidates=count, again=again)


def _page(service: Served) -> float:
    start = time.monotonic()
    for path in ("/studies/large", "/studies/large/chart"):
        status, body = service.ask(path)
        assert status == 200, body[:300]
    return time.monotonic() - start


def submissions() -> Iterator[Figure]:
    """Jobs after 100 clients have submitted five searches each, every one sent twice as after a broken connection."""
    with served("--searches", "0") as service:
        start = time.monotonic()

        def client(number: int) -> list[int]:
            found = []
            for i, _ in itertools.product(range(5), range(2)):
                found.append(
                    service.ask("/v1/studies", {"spec": {"seed": i}}, **{"Idempotency-Key": f"{number}-{i}"})[0]
                )
            return found

        with ThreadPoolExecutor(CLIENTS) as pool:
            statuses = [status for found in pool.map(client, range(CLIENTS)) for status in found]
        seconds = time.monotonic() - start
        jobs = json.loads(service.ask("/v1/queue")[1])
    yield figure(
        "submissions",
        len(jobs),
        "jobs",
        distinct=len({job["study"] for job in jobs}),
        clients=CLIENTS,
        created=statuses.count(201),
        known=statuses.count(200),
        refused=sum(status not in (200, 201) for status in statuses),
        seconds=seconds,
    )


def search_slowdown() -> Iterator[Figure]:
    """How much less a real search on one thread explores with ten pages open: rung-0 candidates per minute, in turns of one search."""
    spec = {"budget": "12m", "shares": {"elastic": 0.05, "explore": 0.8, "confirm": 0.1}, "finalists": 1}
    rates: dict[bool, list[float]] = {False: [], True: []}
    with served(home=None) as service:
        service.ask("/v1/studies", {"spec": {**spec, "fit_points": 8, "mixed_precision": False}, "name": "real"})
        service.wait("real", lambda told: told.get("explored", 0) >= 3, 300)
        for watched in (False, True, True, False, False, True):
            with pages_open(service, "real", PAGES if watched else 0):
                rates[watched].append(rate_of(service, "real", 40.0))
        service.ask("/v1/studies/real/cancel", {})
    alone, beside = statistics.mean(rates[False]), statistics.mean(rates[True])
    yield figure(
        "search_slowdown",
        1 - beside / alone,
        "fraction",
        pages=PAGES,
        alone_per_minute=rates[False],
        beside_per_minute=rates[True],
    )


def rate_of(service: Served, study: str, seconds: float) -> float:
    """Candidates explored per minute, by when they were: whole gaps only."""
    folder = service.home / "studies" / study
    begin = time.time()
    time.sleep(seconds)
    with sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True) as database:
        rows = database.execute(
            "SELECT strftime('%s', at) + (strftime('%f', at) - strftime('%S', at)) FROM evaluation "
            "WHERE fidelity = 'rung0' AND status = 'complete'"
        ).fetchall()
    ends = sorted(float(at) for (at,) in rows if float(at) >= begin)
    return 60 * (len(ends) - 1) / (ends[-1] - ends[0]) if len(ends) > 2 else 0.0


@contextmanager
def pages_open(service: Served, study: str, count: int) -> Iterator[None]:
    """`count` browsers' worth of a study's page: its event stream held open, page and chart asked for as the page does."""
    ending = threading.Event()

    def page() -> None:
        connection = http.client.HTTPConnection(service.host, timeout=120)
        service.ask(f"/studies/{study}")
        service.ask(f"/studies/{study}/chart")
        connection.request("GET", f"/v1/studies/{study}/events", headers=service.headers)
        stream = connection.getresponse()
        while not ending.is_set() and stream.readline():
            pass
        connection.close()

    threads = [threading.Thread(target=page, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join(20)


def first_result_seconds() -> Iterator[Figure]:
    """Seconds from a submit to the first confirmed candidate, on a warm cache (a first search has run in this home)."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        with served(home=home) as service:
            for name in ("first", "second"):
                service.ask("/v1/studies", {"spec": {"budget": "5m"}, "name": name})
                seconds = service.wait(name, lambda told: told.get("confirmed", 0) >= 1, 200)
                service.ask(f"/v1/studies/{name}/cancel", {})
                service.wait(name, lambda told: told["job"]["state"] == "cancelled", 60)
    yield figure("first_result_seconds", seconds, "s")


def recommend_in_process_ms() -> Iterator[Figure]:
    """A recommendation with limits from a view of 10,000 explored and 60 confirmed candidates; reading the view stands beside."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        large_study(home, 10_000)
        start = time.perf_counter()
        view = view_of(home)
        reading = time.perf_counter() - start
        times = []
        for loss in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5):
            start = time.perf_counter()
            advise(view, Limits(loss=loss), None, None, home)
            times.append(1e3 * (time.perf_counter() - start))
    yield figure(
        "recommend_in_process_ms",
        statistics.median(times),
        "ms",
        min(times),
        max(times),
        candidates=len(view.rung0),
        front=len(view.front),
        reading_s=reading,
    )


def view_of(home: Path) -> StudyView:
    store = Store.reader(home / "studies" / "large")
    try:
        return load_view(store)
    finally:
        store.close()


def large_study(home: Path, count: int) -> None:
    """A complete study `large` with `count` explored candidates: 1,000 of the simulated evaluator, and copies of them with other
    seeds' numbers and keys of their own."""
    from paretune.hardware_profiles.profile import detected_profile
    from paretune.search.evaluators.simulated import SHAPE, SimulatedEvaluator
    from paretune.spaces.space import Space

    profile = detected_profile()
    meta = {
        "state": "complete",
        "spec": {"objectives": ["nll", "decode_ms_per_token", "compressed_bytes"], "teacher": "stdlib-coder"},
        "spent_s": 1.0,
        "budget_s": 1.0,
        "teacher": {"name": "stdlib-coder", "digest": "0", "parameters": 1},
        "profile": profile.model_dump(mode="json"),
    }
    store = Store.create(home / "studies" / "large", meta)
    (store.folder / "setup.json").write_text(
        json.dumps({"spec": {}, "profile": profile.model_dump(mode="json")}), encoding="utf-8"
    )
    evaluator, space = SimulatedEvaluator(store.folder, home), Space.of(SHAPE, profile.weight_formats)
    fill(store, space, evaluator)
    store.close()
    multiply(home / "studies" / "large" / "study.db", count)
    shutil.rmtree(home / "cache", ignore_errors=True)


def multiply(database: Path, count: int) -> None:
    """Add rung-0 candidates until there are `count`."""
    noise = random.Random(0)
    with sqlite3.connect(database) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(evaluation)")][1:]
        rows = connection.execute(
            f"SELECT {', '.join(columns)} FROM evaluation WHERE fidelity = 'rung0' AND status = 'complete'"
        ).fetchall()
        source = dict(connection.execute("SELECT key, candidate FROM candidate"))
        number = connection.execute("SELECT max(number) FROM candidate").fetchone()[0]
        for i in range(count - len(rows)):
            row = dict(zip(columns, rows[i % len(rows)], strict=True))
            key = f"{noise.getrandbits(64):016x}"
            number += 1
            connection.execute(
                "INSERT INTO candidate (key, number, source, candidate, params, created) VALUES (?, ?, 'sampler', ?, '{}', ?)",
                (key, number, source[row["key"]], row["at"]),
            )
            measurements = json.loads(row["measurements"])
            for m in measurements.values():
                factor = noise.uniform(0.9, 1.1)
                m.update(value=m["value"] * factor, low=m["low"] * factor, high=m["high"] * factor)
            row |= {"key": key, "measurements": json.dumps(measurements)}
            connection.execute(
                f"INSERT INTO evaluation ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                [row[name] for name in columns],
            )
