"""What a refused request is told: JSON for programs, a page for somebody who has opened an address in a browser."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path

import jinja2
from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from paretune.common.version import VERSION
from paretune.service.printable import Json, printable

RETRY_S = {429: "2"}
TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


def told(
    request: Request, status: int, problem: str, remedy: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The refusal as the client can show it; the interface under /v1 speaks JSON to everybody."""
    more = dict(headers or {})
    if status in RETRY_S:
        more.setdefault("retry-after", RETRY_S[status])
    if is_navigation(request):
        page = _template().render(version=VERSION, mlflow=None, status=status, problem=problem, remedy=remedy)
        return HTMLResponse(printable(page), status, more)
    return Json({"error": problem, "remedy": remedy}, status, more)


def is_navigation(request: Request) -> bool:
    """Whether a browser wants to show the answer as a page: scripts and programs do not accept HTML."""
    wants = "text/html" in request.headers.get("accept", "")
    return wants and request.method in ("GET", "HEAD") and not request.url.path.startswith("/v1/")


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals["title_of"] = lambda status: HTTPStatus(status).phrase.lower()
    return environment.get_template("error.html")
