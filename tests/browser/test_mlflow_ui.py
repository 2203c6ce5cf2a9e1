"""MLflow's own page over studies, in a real browser: the ready-made views, the comparison, the parent run, the registry.

The numbers of the studies are made up by the suite's helpers. For the pictures in docs a home with real studies is named:
PARETUNE_PICTURES=1 PARETUNE_PICTURES_HOME=mlruns python -m pytest tests/browser/test_mlflow_ui.py
"""

from __future__ import annotations

import html
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view
from paretune.spaces.candidate import FP32
from paretune.tracking.mlflow.experiment import CHOICES, COSTS, VIEWS, runs_page
from paretune.tracking.mlflow.registry import model_name
from paretune.tracking.mlflow.sink import rebuild
from support import studies

START_S = 90.0


def make_studies(home: Path) -> None:
    """Two made-up studies of one teacher: `night` with all kinds of points and a board as further target, `earlier` with its
    baselines and one student."""
    with_everything = studies.new_study(home / "studies" / "night")
    studies.fill(with_everything)
    studies.add_board(with_everything)
    small = studies.new_study(home / "studies" / "earlier")
    for fmt, decode, megabytes in ((FP32, 0.95, 21.0), (studies.INT4, 0.36, 3.6)):
        studies.confirm(
            small, studies.candidate(fmt=fmt), 2.0 if fmt.bits == 32 else 2.06, decode, megabytes, source="baseline"
        )
    studies.confirm(small, studies.candidate(5, 640, studies.INT4), 2.12, 0.29, 3.0)
    for store in (with_everything, small):
        store.set_meta(state="complete")
        store.close()


@dataclass
class Shown:
    """A home whose MLflow is open at `address`, the page that `paretune ui` names; `views` by study."""

    address: str
    cookie: dict[str, str]
    home: Path
    views: dict[str, StudyView]

    @property
    def server(self) -> str:
        return self.address.split("#")[0].rstrip("/")

    def route(self, view: str) -> str:
        found = re.search(r"/experiments/(\d+)/", self.address)
        assert found is not None
        return f"{self.server}/#{runs_page(found[1], view)}"

    @property
    def main(self) -> StudyView:
        """The study with the most targets, then the largest front."""
        return max(self.views.values(), key=lambda view: (len(view.targets), len(view.front)))

    def expected(self, view: str) -> int:
        """How many runs a saved view has to show."""
        studies = self.views.values()
        return {
            "fronts": sum(len(v.front) for v in studies),
            "recommended": len(self.views),
            "confirmed": sum(len(v.confirmed) for v in studies),
            "studies": len(self.views),
        }[view]


@pytest.fixture(scope="module")
def shown(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    home = tmp_path_factory.mktemp("home")
    real = os.environ.get("PARETUNE_PICTURES_HOME")
    if real:
        shutil.copytree(Path(real) / "studies", home / "studies")
    else:
        make_studies(home)
    views = {}
    for folder in sorted((home / "studies").iterdir()):
        rebuild(home, folder)
        store = Store.reader(folder)
        views[folder.name] = load_view(store)
        store.close()
    log = home / "ui.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "paretune", "ui", "--home", str(home), "--port", str(free_port())]
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield Shown(*enter(told_link(process, log)), home, views)
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def told_link(process: subprocess.Popen[bytes], log: Path) -> str:
    """The link that the command prints once MLflow answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r"at (http://127\.0\.0\.1:\d+/login\?key=\S+)", log.read_text(encoding="utf8"))
        if found is not None:
            return found[1]
        time.sleep(0.2)
    pytest.fail(f"MLflow did not come up: {log.read_text(encoding='utf8')[-600:]}")


def enter(link: str) -> tuple[str, dict[str, str]]:
    """Where the link leads, and the cookie that it gives, once: every page of these tests has it."""
    server = link.split("/login")[0]
    try:
        with urllib.request.urlopen(link, timeout=30) as answer:
            name, _, value = str(answer.headers["set-cookie"]).partition(";")[0].partition("=")
            led = re.search(r'url=([^"]+)"', answer.read().decode())
    except urllib.error.HTTPError as error:
        pytest.fail(f"the link led nowhere: {error.code}")
    assert led is not None
    return server + html.unescape(led[1]), {"name": name, "value": value, "url": server}


@pytest.fixture
def mlflow_page(shown: Shown, visit: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`mlflow_page(address, height)`: MLflow opened there by somebody who came by the link. It may reach nothing outside, no policy
    stops one of its scripts, no part of the assistant is seen, and nothing is refused but what is off."""
    opened, refused = [], []

    def open_page(address: str, height: int = 1000) -> Any:
        found = visit(width=1640, height=height)
        opened.append(found)
        found.page.context.add_cookies([shown.cookie])
        found.page.on("response", lambda answer: refused.append(answer.url) if answer.status >= 400 else None)
        found.page.goto(address)
        return found.page

    yield open_page
    assert [url for found in opened for url in found.outside] == []
    assert [url for url in refused if not re.search(r"/(assistant/(config|providers)|users/current)$", url)] == []
    for found in opened:
        assert not [text for text in found.errors if "Content Security Policy" in text]
        assert found.page.locator("[data-assistant-ui]:visible").count() == 0
        assert found.page.get_by_text("WebGL is not supported").count() == 0


def matching(page: Any, number: int) -> None:
    """Wait until the runs page says that so many runs match."""
    page.get_by_text(re.compile(rf"^{number}\s+matching runs?$")).wait_for()


def shoot(picture: Callable[..., Path], page: Any, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # lines are drawn step by step
    picture(page, name)


def axes_of(page: Any, number: int) -> list[str]:
    """Titles of the parallel coordinates, from left to right, once there are so many."""
    titles = page.locator(".parcoords .axis-title, .parcoords .dimension .label")  # two libraries draw them
    titles.nth(number - 1).wait_for(state="attached")
    placed = titles.evaluate_all("all => all.map(t => [t.getBoundingClientRect().x, t.textContent])")
    return [text for _, text in sorted(placed)]


def test_ui_opens_on_the_fronts(shown: Shown, mlflow_page: Callable[..., Any], picture: Callable[..., Path]) -> None:
    """The address that `paretune ui` prints leads to the charts at once: quality against costs, and parallel coordinates."""
    page = mlflow_page(shown.address, 1420)
    matching(page, shown.expected("fronts"))
    assert page.get_by_test_id("saved-views-trigger").inner_text() == VIEWS[0].name
    scatters = page.locator(".js-plotly-plot:has(.scatterlayer .point)")
    scatters.nth(1).wait_for()
    drawn = [
        (plot.locator(".xtitle").text_content(), plot.locator(".ytitle").text_content()) for plot in scatters.all()
    ]
    assert drawn == [("decode_ms_per_token", "nll"), ("compressed_bytes", "nll")]
    for plot in scatters.all():
        assert plot.locator(".scatterlayer .point").count() == shown.expected("fronts")
    assert axes_of(page, 7) == [*CHOICES, *COSTS]
    text = page.locator("body").inner_text()
    for section in ("Model metrics", *sorted({t.name for view in shown.views.values() for t in view.targets})):
        assert re.search(rf"{section}\s*\(\d+\)", text), section
    shoot(picture, page, "mlflow-fronts.png")


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.key)
def test_every_view_shows_its_runs(
    shown: Shown, mlflow_page: Callable[..., Any], picture: Callable[..., Path], view: Any
) -> None:
    page = mlflow_page(shown.route(view.key).replace("&compareRunsMode=CHART", ""), 640)
    matching(page, shown.expected(view.key))
    for column in view.columns[:5]:
        wanted = re.sub(r"\w+\.`(.*)`", r"\1", column)
        page.locator("[role=columnheader]").filter(has_text=re.compile(rf"^\s*{wanted}\s*$")).first.wait_for()
    if view.key in ("fronts", "studies"):
        shoot(picture, page, {"fronts": "mlflow-runs.png", "studies": "mlflow-studies.png"}[view.key])


def test_selected_runs_compare(shown: Shown, mlflow_page: Callable[..., Any], picture: Callable[..., Path]) -> None:
    """Ticking all runs of the view and Compare: the axes that MLflow chooses by itself are numbers that vary."""
    page = mlflow_page(shown.route("fronts").replace("&compareRunsMode=CHART", ""), 1500)
    number = shown.expected("fronts")
    matching(page, number)
    page.locator("[role=columnheader] input[type=checkbox]").first.check()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text(f"Comparing {number} Runs").wait_for()
    assert axes_of(page, 4) == ["bits", "ffn_width", "layers", "nll"]
    ticks = page.locator(".parcoords .axis .tick text").all_text_contents()
    assert len(ticks) > 8 and all(float(text) > 0 for text in ticks if text), "every axis is a scale of numbers"
    for name in ("precision_ffn", "sparsity_pattern", "decode_ms_per_token", "compressed_bytes"):
        assert page.get_by_text(name, exact=True).count(), name
    shoot(picture, page, "mlflow-compare.png")


def test_a_study_begins_with_its_answer(
    shown: Shown, mlflow_page: Callable[..., Any], picture: Callable[..., Path]
) -> None:
    page = mlflow_page(shown.route("studies").replace("&compareRunsMode=CHART", ""), 1420)
    matching(page, len(shown.views))
    page.get_by_role("link", name=shown.main.study, exact=True).click()
    page.get_by_text("Recommended:").wait_for()
    page.get_by_text("Show more").first.click()
    page.wait_for_function(
        "() => [...document.images].some(i => i.src.includes('front.png') && i.naturalWidth === 1200)"
    )
    text = page.locator("main, body").first.inner_text()
    assert text.index("Recommended:") < text.index("Front on")
    for point in shown.main.front[:5]:
        assert point.name in text
    shoot(picture, page, "mlflow-study.png")


def test_the_registry_has_an_alias_per_profile(
    shown: Shown, mlflow_page: Callable[..., Any], picture: Callable[..., Path]
) -> None:
    view = shown.main
    page = mlflow_page(f"{shown.server}/#/models/{model_name(view)}?workflowType=machine_learning", 700)
    wanted = [str(view.meta["profile"]["name"]), *(t.name for t in view.targets)]
    for alias in wanted:
        page.get_by_text(f"@ {alias}", exact=True).first.wait_for()
    shoot(picture, page, "mlflow-models.png")


def test_artifacts_are_shown(shown: Shown, mlflow_page: Callable[..., Any]) -> None:
    """The list of a study's files, a picture, and the report with its chart, which has a script of its own."""
    page = mlflow_page(shown.route("studies").replace("&compareRunsMode=CHART", ""), 1000)
    matching(page, len(shown.views))
    page.get_by_role("link", name=shown.main.study, exact=True).click()
    page.get_by_text("Recommended:").wait_for()
    assert page.get_by_role("link", name="Model registry").is_visible(), "on the side for models, not for prompts"
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("front.png", exact=True).first.click()
    page.wait_for_function("() => [...document.images].some(i => i.src.startsWith('blob:') && i.naturalWidth === 1200)")
    page.get_by_text("report.html", exact=True).first.click()
    frame = page.frame_locator("iframe")
    frame.get_by_role("heading", name="Recommended:").wait_for()
    frame.locator(".js-plotly-plot .scatterlayer .point").first.wait_for(state="attached")
