"""Pictures of a finished study for the documentation, taken in a real browser.

    python docs/make_pictures.py [--home mlruns] [--study ID] [--out docs/pictures] [--report-only]

front.png is the report's own picture; report.png and report-dark.png are the page in headless Chromium; mlflow-runs.png
and mlflow-compare.png are MLflow's own pages over the home's database, served for as long as this runs. Nothing of the
home is changed. Exit codes are those of `paretune`: 2 without a finished study, 5 without browser or Playwright.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune.hardware_profiles.errors import EnvironmentProblem, ParetuneError, UsageError
from paretune.search.store import Store
from paretune.search.view import load_view
from paretune.tracking.mlflow_runs import EXPERIMENT
from paretune.tracking.picture import front_png
from paretune.tracking.ui import QUIET, server_command

START_S, GRACE_S, PAGE_S = 90.0, 10.0, 30.0
MOST_COMPARED = 20
# The axes of the comparison; the last metric gives the colour. The long names are not neighbours, they would overlap.
PARAMETERS = ("layers", "ffn", "kv_groups", "sparsity", "ffn_precision", "attention", "head")
MOST_PARAMETERS = 5
METRICS = ("compressed_bytes", "nll", "decode_ms_per_token")
COLUMNS = {
    "metrics.`nll`": 110,
    "metrics.`relative_loss`": 120,
    "metrics.`decode_ms_per_token`": 175,
    "metrics.`ttft_ms`": 110,
    "metrics.`compressed_bytes`": 150,
    "tags.`source`": 90,
    "tags.`pareto`": 80,
    "tags.`recommended`": 130,
}
# What a visitor would click away once: the assistant, the telemetry notice; and the side of MLflow that shows runs.
SETTLED = {
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
    "mlflow.assistant.panelOpen_v1": "false",
    "mlflow.telemetry.info.alert.dismissed_v1": "true",
    "mlflow.workflowType_v1": '"machine_learning"',
}
HIDE_ASSISTANT = "[data-assistant-ui] { display: none !important }"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("mlruns"), help="where the study lives")
    parser.add_argument("--study", help="id of the study; the latest complete one if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "pictures", help="folder to fill")
    parser.add_argument("--report-only", action="store_true", help="leave MLflow's pages out")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="path of Chromium")
    arguments = parser.parse_args()
    try:
        study = find_study(arguments.home.resolve(), arguments.study)
        arguments.out.mkdir(parents=True, exist_ok=True)
        with open_browser(arguments.browser) as browser:
            picture_report(browser, study, arguments.out)
            if not arguments.report_only:
                picture_mlflow(browser, arguments.home.resolve(), study.name, arguments.out)
    except ParetuneError as error:
        print(f"error: {error.problem}\nremedy: {error.remedy}", file=sys.stderr)
        return error.exit_code
    return 0


def find_study(home: Path, wanted: str | None) -> Path:
    """Folder of the wanted or the latest complete study. Raises UsageError if there is none."""
    found = sorted((home / "studies").glob("*/study.db"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in found if wanted in (None, path.parent.name)):
        store = Store.reader(folder)
        with contextlib.closing(store):
            if store.meta("state") == "complete":
                return folder
    raise UsageError(
        f"there is no complete study {wanted or ''} in {home / 'studies'}".replace("  ", " "),
        "run `paretune search` to its end first, or name another --home",
    )


@contextlib.contextmanager
def open_browser(path: str) -> Iterator[Any]:
    """Headless Chromium through Playwright. Raises EnvironmentProblem if one of them is not installed."""
    if not Path(path).exists():
        raise EnvironmentProblem(
            f"there is no browser at {path}", "apt-get install chromium, or name one with --browser"
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise EnvironmentProblem(
            f"Playwright cannot be imported: {error}", f"{sys.executable} -m pip install playwright"
        ) from None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


def picture_report(browser: Any, study: Path, out: Path) -> None:
    """The study's report on a bright and on a dark screen, and its front as a file."""
    if (study / "front.png").exists():
        shutil.copyfile(study / "front.png", out / "front.png")
    else:
        with contextlib.closing(Store.reader(study)) as store:
            front_png(load_view(store), out / "front.png")
    _say(out / "front.png")
    for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
        page = browser.new_page(viewport={"width": 1380, "height": 1500}, color_scheme=scheme)
        page.goto((study / "report.html").as_uri(), timeout=1000 * PAGE_S)
        page.locator("#front .main-svg").first.wait_for(timeout=1000 * PAGE_S)
        page.wait_for_timeout(800)
        page.screenshot(path=out / name)
        page.close()
        _say(out / name)


def picture_mlflow(browser: Any, home: Path, study: str, out: Path) -> None:
    """MLflow's table of the study's candidates and its comparison of the front."""
    with serve_mlflow(home) as base:
        experiment = _ask(base, "experiments/get-by-name?experiment_name=" + EXPERIMENT)["experiment"]["experiment_id"]
        mine = f"tags.`paretune.study` = '{study}' and tags.`paretune.kind` = 'candidate'"
        wanted = {"experiment_ids": [experiment], "filter": mine, "max_results": 1000, "order_by": ["metrics.nll ASC"]}
        runs = _ask(base, "runs/search", wanted).get("runs", [])
        front = [run for run in runs if {"key": "pareto", "value": "true"} in run["data"]["tags"]]
        if not front:
            raise UsageError(f"MLflow has no front runs of {study}", f"paretune sync {study}")
        context = browser.new_context(viewport={"width": 1660, "height": min(2000, 360 + 32 * len(runs))})
        context.set_default_timeout(1000 * PAGE_S)
        seeds = "".join(f"localStorage.setItem({json.dumps(k)}, {json.dumps(v)});" for k, v in SETTLED.items())
        context.add_init_script(seeds)
        page = context.new_page()
        picture_runs(page, base, experiment, mine, out / "mlflow-runs.png")
        page.set_viewport_size({"width": 1600, "height": 2000})
        picture_comparison(page, base, experiment, front[:MOST_COMPARED], out / "mlflow-compare.png")
        context.close()


def picture_runs(page: Any, base: str, experiment: str, condition: str, file: Path) -> None:
    """The runs table with the columns that matter, best quality first."""
    url = f"{base}/#/experiments/{experiment}/runs"
    key = f'MLflowLocalStorage-1.1-ExperimentPage-["{experiment}"]-ReactComponentState'
    page.goto(url)
    page.get_by_text("matching runs").wait_for()
    page.wait_for_function("key => localStorage.getItem(key) !== null", arg=key)
    state = json.loads(page.evaluate("key => localStorage.getItem(key)", key))
    state |= {"selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS}
    state |= {"searchFilter": condition, "orderByKey": "metrics.`nll`", "orderByAsc": True}
    page.evaluate("([key, value]) => localStorage.setItem(key, value)", [key, json.dumps(state)])
    page.goto("about:blank")  # the application reads its settings only when it is loaded anew
    page.goto(url)
    page.get_by_text("decode_ms_per_token").first.wait_for()
    page.get_by_text("teacher fp32").first.wait_for()
    _shoot(page, file)


def picture_comparison(page: Any, base: str, experiment: str, runs: list[dict[str, Any]], file: Path) -> None:
    """The comparison page: parallel coordinates from size, sparsity and precision to the objectives, and all values."""
    identities = json.dumps([run["info"]["run_id"] for run in runs], separators=(",", ":"))
    page.goto("about:blank")
    page.goto(f"{base}/#/compare-runs?runs={urllib.parse.quote(identities)}&experiments={json.dumps([experiment])}")
    page.get_by_text(f"Comparing {len(runs)} Runs").wait_for()
    page.get_by_role("button", name="Clear All").click()
    selects = page.locator("[class*=select-multiple]")
    for position, names in ((0, _differing(runs)), (1, METRICS)):
        for name in names:
            _choose(page, selects.nth(position), name)
    for run in (runs[0], runs[-1]):
        page.get_by_text(run["info"]["run_name"], exact=True).first.wait_for(state="attached")
    for name in METRICS:  # in the plot and in the table of metrics below it
        page.get_by_text(name, exact=True).nth(1).wait_for(state="attached")
    _shoot(page, file)


def _differing(runs: list[dict[str, Any]]) -> list[str]:
    """The first few parameters in which the runs differ."""
    values = [{p["key"]: p["value"] for p in run["data"]["params"]} for run in runs]
    return [name for name in PARAMETERS if len({v.get(name) for v in values}) > 1][:MOST_PARAMETERS]


def _choose(page: Any, select: Any, name: str) -> None:
    """Add one option to a multiple select, whose long list only renders what is in sight."""
    select.click()
    options = page.locator("[class*=select-dropdown]:not([class*=dropdown-hidden])").last
    option = options.locator(f'[title="{name}"]')
    options.hover()
    page.mouse.wheel(0, -10_000)  # it opens where the last choice was
    page.wait_for_timeout(250)
    for _ in range(40):
        if option.count():
            break
        options.hover()
        page.mouse.wheel(0, 120)
        page.wait_for_timeout(150)
    option.click()
    page.keyboard.press("Escape")
    page.wait_for_timeout(250)


def _shoot(page: Any, file: Path) -> None:
    page.add_style_tag(content=HIDE_ASSISTANT)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)
    page.screenshot(path=file)
    _say(file)


@contextlib.contextmanager
def serve_mlflow(home: Path) -> Iterator[str]:
    """MLflow's server as `paretune ui` starts it, on a free port of the loopback; ended with everything it started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        command = server_command(home, port)
        server = subprocess.Popen(command, env=os.environ | QUIET, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_up(server, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(server)


def _wait_until_up(server: subprocess.Popen[bytes], url: str, log: Any) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.3)
    log.seek(0)
    words = log.read()[-400:].decode("utf8", "replace").strip()
    raise EnvironmentProblem(f"MLflow did not answer at {url} within {START_S:.0f} s: {words}", "see `paretune ui`")


def _end(server: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, kind)
            server.wait(GRACE_S)


def _ask(base: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """A request to MLflow's REST interface. Raises UsageError if it refuses."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{base}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PAGE_S) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise UsageError(f"MLflow refused {path}: {error.read()[:300]!r}", "paretune sync rebuilds it") from None
    return found


def _say(file: Path) -> None:
    print(f"{file} ({file.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    sys.exit(main())
