"""A browser's way in: it sends the token once and gets a cookie that scripts cannot read and other sites cannot use."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from paretune.common.agent_access import token_matches
from paretune.service.api.models import Nothing, Problem, Token
from paretune.service.queue.job import WrongToken
from paretune.service.security.proxies import forwarded_scheme
from paretune.service.security.sessions import COOKIE, SECURE_COOKIE, SESSION_S, session_names
from paretune.service.state import Service


def login_router(service: Service) -> APIRouter:
    """POST /login and /logout."""
    router = APIRouter(tags=["session"])

    @router.post("/login", status_code=204, responses={403: {"model": Problem, "description": "a wrong token"}})
    async def login(given: Token, request: Request, response: Response) -> None:
        """Exchange the token for the session's cookie."""
        if not await run_in_threadpool(token_matches, f"Bearer {given.token}", service.token):
            raise WrongToken("this is not the service's token", "copy it from what `paretune serve` has printed")
        _end_sessions(service, request)
        secure = _is_behind_tls(service, request)
        response.set_cookie(
            SECURE_COOKIE if secure else COOKIE,
            service.sessions.begin(),
            max_age=SESSION_S,
            path="/",
            secure=secure,
            httponly=True,
            samesite="strict",
        )

    @router.post("/logout", status_code=204)
    async def logout(_: Nothing, request: Request, response: Response) -> None:
        """End the session and take the cookie back."""
        _end_sessions(service, request)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        if _is_behind_tls(service, request):
            response.delete_cookie(SECURE_COOKIE, path="/", secure=True, httponly=True, samesite="strict")

    return router


def _end_sessions(service: Service, request: Request) -> None:
    for name in session_names(request.headers.getlist("cookie")):
        service.sessions.end(name)


def _is_behind_tls(service: Service, request: Request) -> bool:
    """Whether the browser came by https: a trusted proxy says so, or the page's own Origin, which the guard has checked."""
    peer = "" if request.client is None else request.client.host
    if service.is_proxy(peer):
        said = forwarded_scheme(request.headers.getlist("x-forwarded-proto"))
        if said is not None:
            return said == "https"
    return request.headers.get("origin", "").lower().startswith("https://")
