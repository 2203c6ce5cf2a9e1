"""Pages that stay open: many tabs, a study that goes on, a service that ends, a session that is over, a thousand studies."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from paretune.search.study.store import Store
from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.server.app import create_app
from paretune.service.server.serve import bind
from paretune.service.state import Service

TOKEN = "browser-token-browser-token"


@dataclass
class Running:
    """A service that a test can end and start again on the same port."""

    home: Path
    queue: Queue
    port: int
    stop: Callable[[], None]
    start: Callable[[], None]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def running(simulated_home: Path, tmp_path: Path) -> Iterator[Running]:
    home = Path(shutil.copytree(simulated_home, tmp_path / "home"))
    queue, known = Queue(home), dict[str, Any]()
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]

    def start() -> None:
        listening = known.pop("first", None) or bind("127.0.0.1", port)
        config = uvicorn.Config(
            create_app(Service(home, Studies(home), queue, TOKEN)),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 120
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        known["server"], known["thread"] = server, thread

    def stop() -> None:
        known["server"].should_exit = True
        known["thread"].join(15)

    known["first"] = first
    start()
    yield Running(home, queue, port, stop, start)
    stop()
    queue.close()


@pytest.fixture
def entered(running: Running, visit: Callable[..., Any]) -> Callable[..., Any]:
    def enter(path: str = "/", **options: Any) -> Any:
        found = visit(**options)
        found.page.goto(f"{running.address}/login#token={TOKEN}")
        found.page.wait_for_url(f"{running.address}/")
        if path != "/":
            found.page.goto(running.address + path)
        return found

    return enter


@pytest.fixture
def live(running: Running) -> Iterator[Store]:
    """The study `live`, which a search seems to run on: this test holds its lock."""
    folder = Path(shutil.copytree(running.home / "studies" / "nightly", running.home / "studies" / "live"))
    store = Store.open_study(folder)
    store.set_meta(state="running", stage="explore", spent_s=10.0, spent_at=None)
    yield store
    store.close()


def drawn(page: Any) -> None:
    page.wait_for_selector("#chart .scatterlayer .point")


def confirm_one(store: Store) -> str:
    """Confirm a candidate that was only estimated, as good as the best; its key."""
    done = {e.key for e in store.evaluations("confirmed", "complete")}
    key = next(e.key for e in store.evaluations("rung0", "complete") if e.key not in done)
    best = store.evaluations("confirmed", "complete")[-1]
    store.start(key, "confirmed")
    assert store.finish(
        key, "confirmed", "complete", measurements=best.measurements, scores=best.scores, facts=best.facts
    )
    return key


def test_eight_tabs_share_a_stream_and_every_page_loads(entered: Callable[..., Any], running: Running) -> None:
    """A browser has six connections to a service: six open streams made the seventh tab wait for ever."""
    names = [running.queue.submit({}, None, f"waits-{i}")[0].study for i in range(8)]
    found = entered()
    tabs = [found.page.context.new_page() for _ in names]
    for tab, name in zip(tabs, names, strict=True):
        tab.goto(f"{running.address}/studies/{name}", wait_until="load")
        assert name in tab.locator("h1").inner_text()
    found.page.goto(f"{running.address}/new")
    assert found.page.locator("h1").inner_text() == "New search"
    running.queue.pause(names[0])
    running.queue.pause(names[7])
    for tab in (tabs[0], tabs[7]):
        tab.wait_for_function("() => document.getElementById('state').textContent === 'paused'")
    tabs[3].wait_for_function("() => document.getElementById('told').textContent.includes('Place 3')")
    for tab in tabs[:7]:
        tab.close()
    running.queue.resume(names[7])
    tabs[7].wait_for_function("() => document.getElementById('state').textContent === 'queued'")
    assert found.errors == []


def test_a_browser_without_shared_workers_asks(entered: Callable[..., Any], running: Running) -> None:
    study = running.queue.submit({}, None, "waits")[0].study
    found = entered()
    found.page.add_init_script("delete globalThis.SharedWorker")
    found.page.goto(f"{running.address}/studies/{study}")
    running.queue.pause(study)
    found.page.wait_for_function("() => document.getElementById('state').textContent === 'paused'")
    assert found.errors == []


def test_a_confirmation_leaves_what_was_set(entered: Callable[..., Any], live: Store, running: Running) -> None:
    found = entered("/studies/live")
    page = found.page
    drawn(page)
    page.evaluate("window.same = true")
    for _ in range(30):
        page.press("#max_latency_ms", "ArrowLeft")
    page.select_option("#goal", "smallest")
    page.select_option("#x-axis", "compressed_bytes")
    page.check("#x-log")
    page.check("#front-table input[type=checkbox] >> nth=0")
    ticked = page.locator("#front-table input:checked").get_attribute("value")
    limit = page.locator("#max_latency_ms-shown").inner_text()
    page.wait_for_function("() => location.search.includes('max_latency_ms')")
    key = confirm_one(live)
    counted = "() => document.getElementById('counts').textContent.includes('%d confirmed')"
    page.wait_for_function(counted % len({e.key for e in live.evaluations("confirmed", "complete")}))
    page.wait_for_function(
        "key => document.getElementById('chart').data.some(t => (t.customdata ?? []).includes(key) && t.name !== 'estimated (rung 0)')",
        arg=key,
    )
    assert page.evaluate("window.same"), "the page was not loaded again"
    assert page.locator("#max_latency_ms-shown").inner_text() == limit
    assert page.input_value("#goal") == "smallest" and page.input_value("#x-axis") == "compressed_bytes"
    assert page.is_checked("#x-log") and page.is_checked(f"input[value='{ticked}']")
    assert page.evaluate("document.getElementById('chart').layout.xaxis.type") == "log"
    address = page.url
    assert all(part in address for part in ("goal=smallest", "x=compressed_bytes", "log=1")), address
    other = page.context.new_page()
    other.goto(address)
    drawn(other)
    assert other.locator("#max_latency_ms-shown").inner_text() == limit and other.input_value("#goal") == "smallest"
    assert other.input_value("#x-axis") == "compressed_bytes" and other.is_checked("#x-log")
    assert found.errors == []


def test_time_goes_on_between_two_reports(entered: Callable[..., Any], live: Store) -> None:
    from paretune.search.study.records import now

    live.set_meta(spent_s=100.0, spent_at=[100.0, now()], stage="latency fit")
    found = entered("/studies/live")
    page = found.page
    page.wait_for_function("() => document.getElementById('live').textContent.includes('latency fit')")
    first = page.locator("#time").inner_text()
    page.wait_for_function("old => document.getElementById('time').textContent !== old", arg=first)
    assert first.startswith("1 min ") and page.locator("#time").inner_text() > first
    page.goto(page.url.split("/studies")[0])
    cell = "tr[data-study=live] [data-field=spent]"
    first = page.locator(cell).inner_text()
    page.wait_for_function(f"old => document.querySelector('{cell}').textContent !== old", arg=first)
    assert "latency fit" in page.locator("tr[data-study=live]").inner_text()
    assert found.errors == []


def test_a_service_that_ends_and_a_session_that_is_over_are_said(
    entered: Callable[..., Any], live: Store, running: Running
) -> None:
    page = entered("/studies/live").page
    drawn(page)
    running.stop()
    page.wait_for_function("() => document.getElementById('banner').textContent.includes('connection to the service')")
    assert page.locator("#banner").is_visible()
    page.click("[data-verb=pause]")
    page.wait_for_function("() => document.getElementById('told-action').textContent.includes('does not answer')")
    running.start()  # which voids all sessions
    page.click("[data-verb=pause]")
    page.wait_for_function("() => document.getElementById('banner').textContent.includes('session has ended')")
    page.click("#banner a")
    page.wait_for_url("**/login?next=*")
    page.evaluate(f"location.hash = 'token={TOKEN}'")  # what pasting the printed address into this tab does
    page.wait_for_url(f"{running.address}/studies/live")
    assert TOKEN not in page.url


def test_a_next_page_elsewhere_is_not_followed(entered: Callable[..., Any], running: Running) -> None:
    page = entered().page
    for bad in ("https://example.org/", "//example.org/", "/\\example.org", "javascript:alert(1)", "/login"):
        page.goto("about:blank")
        page.goto(f"{running.address}/login?next={bad}#token={TOKEN}")
        page.wait_for_url(f"{running.address}/")


def test_many_studies_and_long_names(
    entered: Callable[..., Any], running: Running, picture: Callable[..., Path]
) -> None:
    source = running.home / "studies" / "nightly"
    for i in range(120):
        folder = running.home / "studies" / f"s{i:03}-{'x' * (70 if i == 119 else 3)}"
        folder.mkdir()
        shutil.copy(source / "study.db", folder / "study.db")
    found = entered()
    page = found.page
    assert page.locator("tbody tr").count() == 50
    assert page.evaluate("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('.wide'))"), (
        "no column is pushed off"
    )
    picture(page, "service-studies.png")
    page.click("a[rel=next]")
    page.wait_for_url("**offset=50*")
    page.fill("#q", "s01")
    page.press("#q", "Enter")
    page.wait_for_url("**q=s01*")
    assert page.locator("tbody tr").count() == 10
    page.goto(f"{running.address}/compare")
    assert page.locator("input[type=checkbox]").count() == 50
    assert found.errors == []


def test_a_wrong_address_is_a_page(entered: Callable[..., Any], picture: Callable[..., Path]) -> None:
    page = entered("/studies/none", width=360, color_scheme="dark").page
    assert page.locator("h1").inner_text() == "404: not found"
    picture(page, "error.png")
    page.click("text=All studies")
    page.wait_for_selector("h1:text('Studies')")
