"""A real browser for the tests of pages: Debian's Chromium through Playwright, which reaches nothing but this machine.

PARETUNE_BROWSER names another Chromium. PARETUNE_PICTURES=1 makes the tests write their pictures into docs/pictures,
else they go into the test's own folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

CHROMIUM = Path(os.environ.get("PARETUNE_BROWSER", "/usr/bin/chromium"))
PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"
# Containers have no user namespaces for the sandbox; the tests open pages of their own only. The rest keeps Chromium from
# calling home.
ARGUMENTS = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
LOOPBACK = {"127.0.0.1", "localhost", "::1", ""}
PATIENCE_MS = 20_000


@dataclass
class Visit:
    """A page with what went wrong on it: console errors and uncaught exceptions, and requests that left the machine (they
    are refused)."""

    page: Page
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, one per module: Playwright keeps an event loop in the thread for as long as it runs. Without a
    browser the tests skip, in CI they fail."""
    if not os.access(CHROMIUM, os.X_OK):
        absent(f"there is no browser at {CHROMIUM}: scripts/install_browser.sh installs one")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        absent(f"Playwright cannot be imported ({error}): pip install -e '.[dev]'")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        try:
            yield chromium
        finally:
            chromium.close()


def absent(problem: str) -> None:
    """Skip, or fail where nobody would see that: in CI."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(problem, pytrace=False)
    pytest.skip(problem)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """`visit(width=1280, height=900, **options)`: a new page in a context of its own (options of Browser.new_context, as
    color_scheme="dark"), closed after the test."""
    contexts = []

    def open_page(width: int = 1280, height: int = 900, **options: Any) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        found = Visit(context.new_page())
        context.route("**/*", lambda route: guard(found, route))
        found.page.on("console", lambda m: found.errors.append(m.text) if m.type == "error" else None)
        found.page.on("pageerror", lambda error: found.errors.append(str(error)))
        return found

    yield open_page
    for context in contexts:
        context.close()


def guard(visit: Visit, route: Route) -> None:
    """Let a request to this machine pass, note and refuse any other."""
    if (urlsplit(route.request.url).hostname or "") in LOOPBACK:
        route.fallback()
    else:
        visit.outside.append(route.request.url)
        route.abort()


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """`picture(page, "name.png", **options)`: take a picture (options of Page.screenshot) and return its file."""

    def take(page: Page, name: str, **options: Any) -> Path:
        folder = PICTURES if os.environ.get("PARETUNE_PICTURES") else tmp_path
        file = folder / name
        page.screenshot(path=file, **options)
        assert file.read_bytes().startswith(b"\x89PNG")
        return file

    return take
