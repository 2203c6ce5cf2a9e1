"""Pictures of a finished study for the documentation, taken in a real browser.

    python docs/make_pictures.py [--home mlruns] [--study ID] [--out docs/pictures]

front.png is the report's own picture; report.png and report-dark.png are the page in headless Chromium. Pictures of MLflow
are made by tests/browser/test_mlflow_ui.py. Nothing of the home is changed. Exit codes are those of `paretune`: 2
without a finished study, 5 without browser or Playwright.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paretune.common.errors import EnvironmentProblem, ParetuneError, UsageError
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.tracking.charts.front_picture import front_png

PAGE_S = 30.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, default=Path("mlruns"), help="where the study lives")
    parser.add_argument("--study", help="id of the study; the latest complete one if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "pictures", help="folder to fill")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="path of Chromium")
    arguments = parser.parse_args()
    try:
        study = find_study(arguments.home.resolve(), arguments.study)
        arguments.out.mkdir(parents=True, exist_ok=True)
        with open_browser(arguments.browser) as browser:
            picture_report(browser, study, arguments.out)
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


def _say(file: Path) -> None:
    print(f"{file} ({file.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    sys.exit(main())
