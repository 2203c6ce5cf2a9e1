"""A browser's way in: it sends the token once and gets a cookie that scripts cannot read and other sites cannot use."""

from __future__ import annotations

from fastapi import APIRouter, Response
from starlette.concurrency import run_in_threadpool

from paretune.objectives.agent_access import token_matches
from paretune.service.api_models import Nothing, Problem, Token
from paretune.service.job import WrongToken
from paretune.service.security import COOKIE, session_key
from paretune.service.state import Service

DAY_S = 86_400


def login_router(service: Service) -> APIRouter:
    """POST /login and /logout."""
    router = APIRouter(tags=["session"])

    @router.post("/login", status_code=204, responses={403: {"model": Problem, "description": "a wrong token"}})
    async def login(given: Token, response: Response) -> None:
        """Exchange the token for the session's cookie."""
        if not await run_in_threadpool(token_matches, f"Bearer {given.token}", service.token):
            raise WrongToken("this is not the service's token", "copy it from what `paretune serve` has printed")
        response.set_cookie(
            COOKIE, session_key(service.token), max_age=7 * DAY_S, path="/", httponly=True, samesite="strict"
        )

    @router.post("/logout", status_code=204)
    async def logout(_: Nothing, response: Response) -> None:
        """Take the cookie back."""
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")

    return router
