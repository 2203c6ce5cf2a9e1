"""The service's pages in a real browser: charts drawn, limits that move the answer, a search started from the form, and looks."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.server.app import create_app
from paretune.service.server.serve import bind
from paretune.service.state import Service

TOKEN = "browser-token-browser-token"


def remove_study(folder: Path) -> None:
    """The service may be reading it, and then SQLite puts files into it while it is emptied."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} cannot be removed")


@pytest.fixture(scope="module")
def served(simulated_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, Queue]]:
    """(address, home, queue) of a service without a supervisor, on two studies."""
    home = Path(shutil.copytree(simulated_home, tmp_path_factory.mktemp("served") / "home"))
    real = os.environ.get("PARETUNE_PICTURES_STUDY")  # a study's folder, for pictures of the documentation
    if real:
        remove_study(home / "studies" / "nightly")
        shutil.copytree(real, home / "studies" / "nightly")
        store = Store.open_study(home / "studies" / "nightly")
        store.set_meta(study="nightly")
        store.close()
    shutil.copytree(home / "studies" / "nightly", home / "studies" / "other")
    store = Store.open_study(home / "studies" / "other")
    store.set_meta(study="other")
    store.close()
    queue, listening = Queue(home), bind("127.0.0.1", 0)
    service = Service(home, Studies(home), queue, TOKEN)
    config = uvicorn.Config(create_app(service), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", home, queue
    server.should_exit = True
    thread.join(10)
    queue.close()


@pytest.fixture
def entered(served: tuple[str, Path, Queue], visit: Callable[..., Any]) -> Callable[..., Any]:
    """Opens a page as somebody who has followed the printed address."""

    def enter(path: str = "/", **options: Any) -> Any:
        found = visit(**options)
        found.page.goto(f"{served[0]}/login#token={TOKEN}")
        found.page.wait_for_url(f"{served[0]}/")
        if path != "/":
            found.page.goto(served[0] + path)
        return found

    return enter


def drawn(page: Any) -> None:
    page.wait_for_selector("#chart .scatterlayer .point")


def test_a_stranger_is_led_to_the_login_and_a_wrong_token_is_said(
    served: tuple[str, Path, Queue], visit: Callable[..., Any]
) -> None:
    found = visit()
    found.page.goto(f"{served[0]}/studies/nightly")
    assert found.page.url == f"{served[0]}/login"
    found.page.fill("#token", "wrong-token-wrong-token")
    found.page.press("#token", "Enter")
    found.page.wait_for_function("() => document.getElementById('problem').textContent.includes('not the service')")
    found.page.fill("#token", TOKEN)
    found.page.click("button[type=submit]")
    found.page.wait_for_url(f"{served[0]}/")
    assert "token" not in found.page.url
    assert found.page.evaluate("document.cookie") == "", "no script sees the cookie"


def test_the_front_is_drawn_and_a_click_opens_a_candidate(
    entered: Callable[..., Any], served: tuple[str, Path, Queue], picture: Callable[..., Path]
) -> None:
    found = entered("/studies/nightly")
    page = found.page
    drawn(page)
    store = Store.reader(served[1] / "studies" / "nightly")
    view = load_view(store)
    store.close()
    traces = page.evaluate("document.getElementById('chart').data.map(t => [t.name, t.x.length, Boolean(t.error_x)])")
    counts = {name: number for name, number, _ in traces}
    baselines = len(view.baselines)
    dominated = counts.get("confirmed, dominated", 0)
    assert counts["teacher, unchanged"] == baselines and counts["estimated (rung 0)"] == len(view.rung0)
    assert counts["front"] + dominated + baselines == len(view.confirmed)
    assert {name: bars for name, _, bars in traces}["front"], "confirmed points have error bars"
    page.select_option("#x-axis", "compressed_bytes")
    page.wait_for_function("() => document.getElementById('chart').layout.xaxis.title.text.includes('(MB)')")
    page.uncheck("#estimates")
    page.wait_for_function("() => !document.getElementById('chart').data.some(t => t.name.startsWith('estimated'))")
    page.check("#estimates")
    picture(page, "service-study.png", full_page=True)
    key = page.evaluate("document.getElementById('chart').data.find(t => t.name === 'front').customdata[0]")
    page.evaluate(
        "const c = document.getElementById('chart'); const i = c.data.findIndex(t => t.name === 'front');"
        "c.emit('plotly_click', {points: [{customdata: c.data[i].customdata[0]}]})"
    )
    page.wait_for_url(f"**/candidates/{key}")
    assert page.locator("h1").inner_text() and page.locator("text=95 % interval").count()
    picture(page, "service-candidate.png", full_page=False)
    assert found.errors == [] and found.outside == []


def test_limits_move_the_recommendation_by_keyboard(entered: Callable[..., Any]) -> None:
    found = entered("/studies/nightly")
    page = found.page
    drawn(page)
    before = page.locator("#advice h3").inner_text()
    page.focus("#max_latency_ms")
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("old => document.querySelector('#advice h3').innerText !== old", arg=before)
    shown = page.locator("#max_latency_ms-shown").inner_text()
    assert shown.endswith("ms") and page.get_attribute("#max_latency_ms", "aria-valuetext") == shown
    assert "10 % looser" in page.locator("#advice").inner_text()
    assert page.locator("#front-table tr.chosen").count() == 1
    page.focus("#max_loss")
    page.keyboard.press("Home")
    page.wait_for_function(
        "() => document.querySelector('#advice').innerText.includes('No candidate meets these limits')"
    )
    assert "beyond" in page.locator("#advice").inner_text()
    assert found.errors == []


def test_another_profile_is_predicted_and_says_so(entered: Callable[..., Any]) -> None:
    found = entered("/studies/nightly")
    found.page.select_option("#profile", "nvidia-t4")
    found.page.wait_for_url("**profile=nvidia-t4")
    drawn(found.page)
    assert "predicted on the fly" in found.page.locator("header").inner_text()
    found.page.wait_for_function("() => document.getElementById('chart-note').textContent.includes('are predicted')")
    assert "predicted" in found.page.locator("#front-table").inner_text()


def test_studies_are_compared_side_by_side(entered: Callable[..., Any], picture: Callable[..., Path]) -> None:
    found = entered()
    page = found.page
    assert page.locator("#compare").is_disabled()
    page.check("input[value=nightly]")
    page.check("input[value=other]")
    page.click("#compare")
    page.wait_for_url("**/compare?studies=*")
    drawn(page)
    names = page.evaluate("document.getElementById('chart').data.map(t => t.name).filter(Boolean)")
    assert {"nightly", "other"} <= set(names)
    assert page.locator("thead th").count() == 3
    page.goto(page.url.split("/compare")[0] + "/studies/nightly")
    for box in page.locator("#front-table input[type=checkbox]").all()[:3]:
        box.check()
    page.click("#compare")
    page.wait_for_url("**/compare?candidates=*")
    assert page.locator("tbody tr").count() > 5 and found.errors == []
    picture(page, "service-compare.png", full_page=True)


def test_the_form_is_checked_by_the_service_and_starts_a_search(
    entered: Callable[..., Any], served: tuple[str, Path, Queue], picture: Callable[..., Path]
) -> None:
    found = entered("/new")
    page = found.page
    page.fill("#budget", "soon")
    page.click("button[type=submit]")
    page.wait_for_function("() => document.getElementById('budget-problem').textContent.includes('a duration is')")
    assert page.get_attribute("#budget", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == "budget"
    page.fill("#more", "{")
    page.click("button[type=submit]")
    page.wait_for_function("() => document.getElementById('more-problem').textContent.includes('no JSON')")
    page.fill("#more", '{"limits": {"decode_ms_per_token": 20}}')
    page.fill("#budget", "30m")
    page.click("#plan")
    page.wait_for_selector("#planned li", timeout=60_000)
    picture(page, "service-new.png", full_page=True)
    page.fill("#name", "from-the-form")
    page.click("button[type=submit]")
    page.wait_for_url("**/studies/from-the-form")
    job = served[2].job("from-the-form")
    assert job is not None and job.settings["budget"] == "30m" and job.settings["limits"] == {"decode_ms_per_token": 20}
    page.wait_for_function("() => document.getElementById('told').textContent.includes('Place 1')")
    page.click("[data-verb=pause]")
    page.wait_for_function("() => document.getElementById('state').textContent === 'paused'")
    page.click("[data-verb=resume]")
    page.wait_for_function("() => document.getElementById('state').textContent === 'queued'")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("[data-verb=cancel]")
    page.wait_for_function("() => document.getElementById('state').textContent === 'cancelled'")
    assert [e for e in found.errors if "422" not in e] == []  # the browser notes the refusals, too


def test_progress_comes_by_itself(entered: Callable[..., Any], served: tuple[str, Path, Queue]) -> None:
    folder = Path(shutil.copytree(served[1] / "studies" / "nightly", served[1] / "studies" / "live"))
    store = Store.open_study(folder)
    store.set_meta(study="live", state="running", spent_s=10.0)
    try:
        found = entered("/studies/live")
        page = found.page
        page.wait_for_function("() => document.getElementById('state').textContent === 'running'")
        store.set_meta(spent_s=77.0, stage="explore")
        store.event("note", "something new <b>happened</b>")
        page.wait_for_function("() => document.getElementById('live').textContent.includes('1 min 17 s')")
        page.wait_for_function("() => document.querySelector('#events').innerText.includes('something new <b>')")
        store.set_meta(state="complete")
        page.wait_for_function("() => document.getElementById('state').textContent === 'complete'")
        assert found.errors == []
    finally:
        store.close()
        remove_study(folder)


@pytest.mark.parametrize("path", ["/", "/studies/nightly", "/new", "/compare", "/compare?studies=nightly,other"])
def test_a_phone_and_a_dark_room(entered: Callable[..., Any], picture: Callable[..., Path], path: str) -> None:
    found = entered(path, width=360, height=740, color_scheme="dark")
    page = found.page
    if "studies" in path:
        drawn(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.documentElement).backgroundColor]"
    )
    assert contrast(ink, ground) >= 7
    if path == "/studies/nightly":
        picture(page, "service-phone.png", full_page=False)
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "light", "the choice is kept"


@pytest.mark.parametrize("path", ["/login", "/", "/studies/nightly", "/new", "/compare", "/compare?studies=nightly"])
def test_pages_can_be_read_without_eyes_or_a_mouse(entered: Callable[..., Any], path: str) -> None:
    found = entered(path)
    page = found.page
    unnamed = page.evaluate(
        """[...document.querySelectorAll('input,select,textarea,button,a,progress')].filter(e =>
             !(e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim() || e.title)).map(e => e.outerHTML)"""
    )
    assert unnamed == []
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), levels
    assert page.evaluate("document.documentElement.lang") == "en" and page.title()
    page.keyboard.press("Tab")
    focused = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert focused == "solid", "what has the focus is seen"
    empty = page.evaluate("[...document.querySelectorAll('img')].filter(e => !e.alt).length")
    assert empty == 0


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two rgb() colours."""

    def luminance(text: str) -> float:
        values = [int(part) / 255 for part in text[text.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
