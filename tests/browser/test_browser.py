"""The browser itself: it runs scripts, reports their errors, and reaches nothing outside this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install_browser.sh"


def test_a_page_is_drawn_and_its_errors_are_seen(
    visit: Callable[..., Any], picture: Callable[..., Path], tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text("<p id=a>before</p><script>a.textContent = 'after ' + innerWidth; missing()</script>")
    found = visit(width=360, height=640)
    found.page.goto(file.as_uri())
    assert found.page.locator("#a").inner_text() == "after 360"
    assert any("missing" in error for error in found.errors)
    assert picture(found.page, "page.png").stat().st_size > 1000


def test_requests_that_leave_the_machine_are_refused(visit: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("<img src='http://192.0.2.1/picture.png' onerror=\"document.title='refused'\">")
    found = visit()
    found.page.goto(file.as_uri())
    found.page.wait_for_function("document.title == 'refused'")
    assert found.outside == ["http://192.0.2.1/picture.png"]


@pytest.mark.parametrize(("browser", "status"), [("/bin/true", 0), ("/nowhere/chromium", 1)])
def test_the_installer_says_what_it_finds(browser: str, status: int) -> None:
    done = subprocess.run(
        [SCRIPT], env=os.environ | {"PARETUNE_BROWSER": browser}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status and browser in done.stdout + done.stderr
