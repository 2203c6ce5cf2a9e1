"""The service's application: the HTTP interface under /v1, the pages, and the guard around both."""

from __future__ import annotations

import contextlib
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from paretune.common.errors import EnvironmentProblem, NothingFeasible, ParetuneError
from paretune.common.file_access import path_problem
from paretune.common.files import disk_problem
from paretune.common.validation import OWN_RULE
from paretune.common.version import VERSION
from paretune.search.study.control import WrongState
from paretune.search.study.database_errors import database_problem
from paretune.service.api.models import Problem
from paretune.service.api.searches import searches_router
from paretune.service.api.studies import studies_router
from paretune.service.api.wording import without_options
from paretune.service.pages.login import login_router
from paretune.service.pages.refusal import told
from paretune.service.printable import Json
from paretune.service.queue.job import Conflict, QueueFull, Unknown, WrongToken
from paretune.service.security.guard import Guard
from paretune.service.state import Service

DESCRIPTION = """Searches, recommendations and comparisons of paretune. Every request needs `Authorization: Bearer TOKEN` (printed by
`paretune serve`) or the cookie of `/login`; what changes something is sent as JSON. Ids are never paths."""
STATUS: tuple[tuple[type[ParetuneError], int], ...] = (
    (Unknown, 404),
    (WrongToken, 403),
    (Conflict, 409),
    (WrongState, 409),
    (QueueFull, 429),
    (NothingFeasible, 409),
    (EnvironmentProblem, 503),
)
# What the guard and any route may answer; every route's own list has these.
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "no request that is understood"},
    401: {"model": Problem, "description": "no token or cookie"},
    403: {"model": Problem, "description": "a foreign Host or Origin"},
    404: {"model": Problem, "description": "there is no such study, candidate, profile or file"},
    408: {"model": Problem, "description": "the body came too slowly"},
    409: {"model": Problem, "description": "the study's state does not allow it"},
    413: {"model": Problem, "description": "the body is too large"},
    414: {"model": Problem, "description": "path or query are too long"},
    415: {"model": Problem, "description": "the body is no JSON"},
    422: {"model": Problem, "description": "a value is not allowed"},
    429: {"model": Problem, "description": "too many requests"},
    503: {"model": Problem, "description": "the disk or the machine refuses"},
}


def create_app(service: Service) -> Guard:
    """The application of a service, guarded."""
    app = FastAPI(
        title="paretune",
        version=VERSION,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        responses=REFUSALS,
        separate_input_output_schemas=False,
        default_response_class=Json,
    )
    app.add_exception_handler(ParetuneError, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OSError, _machine)
    app.add_exception_handler(sa.exc.DBAPIError, _machine)
    app.add_exception_handler(Exception, _bug)
    app.include_router(login_router(service))
    app.include_router(searches_router(service), prefix="/v1", tags=["searches"])
    app.include_router(studies_router(service), prefix="/v1", tags=["studies"])
    with contextlib.suppress(ModuleNotFoundError):
        from paretune.service.pages.pages import mount_pages

        mount_pages(app, service)
    app.state.home = service.home
    if service.mlflow_socket is None:
        return Guard(app, service)
    from paretune.service.server.mlflow_page import MlflowProxy

    return Guard(MlflowProxy(app, service.mlflow_socket), service)


def status_of(error: ParetuneError) -> int:
    """The HTTP status of an error; what the caller can change is 422."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 422)


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ParetuneError)
    return told(request, status_of(error), without_options(error.problem), without_options(error.remedy))


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    malformed = first["type"] == "json_invalid"
    message = str(first["msg"]).removeprefix(OWN_RULE)
    return told(request, 400 if malformed else 422, f"{where}: {message}"[:500], "look at /v1/openapi.json")


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return told(request, error.status_code, str(error.detail), "", error.headers)


async def _machine(request: Request, error: Exception) -> Response:
    """What the disk or the system refuses, wherever it was met: 503 as JSON; everything else is a mistake of ours."""
    if isinstance(error, sa.exc.DBAPIError):
        problem: ParetuneError | None = database_problem(error, request.app.state.home)
    else:
        assert isinstance(error, OSError)
        problem = disk_problem(error) or path_problem(error)
    if problem is None:
        raise error
    return told(request, 503, without_options(problem.problem), without_options(problem.remedy))


async def _bug(request: Request, error: Exception) -> Response:
    """The traceback goes to the service's own output."""
    return told(request, 500, f"this is a bug in paretune: {type(error).__name__}", "look at the service's own output")
