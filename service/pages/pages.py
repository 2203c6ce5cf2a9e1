"""The pages: rendered here, brought to life by the scripts of static/, which talk to /v1 and take a chart's numbers from here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, FastAPI, Query
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from starlette.staticfiles import StaticFiles

from paretune.common.errors import NothingFeasible, ParetuneError
from paretune.common.version import VERSION
from paretune.search.recommend.compare import compare
from paretune.search.recommend.recommend import Limits
from paretune.search.spec import PRESETS, Spec
from paretune.search.study.summary import summary
from paretune.search.study.view import StudyView, failure_counts
from paretune.service.api import answers
from paretune.service.api.allowed import choices, not_offered
from paretune.service.api.artifacts import files_of
from paretune.service.api.events import clock, status
from paretune.service.api.studies import CandidateKey, Profile, StudyId, pair_of
from paretune.service.pages.chart_data import chart_data, slider_ranges
from paretune.service.printable import printable
from paretune.service.queue.job import Unknown
from paretune.service.state import Service
from paretune.tracking.report.page import POLICY, duration, flat, minute
from paretune.tracking.report.report import report_html
from paretune.tracking.wording import measurement, named, short_of, told, with_interval

HERE = Path(__file__).resolve().parents[1]
REPORT_POLICY = f"sandbox allow-scripts; {POLICY}"  # its script has no origin, so neither cookie nor /v1 are its
LAST_EVENTS = 40
ROWS = 50  # of a page of the list
Text = Annotated[str, Query(max_length=100)]
Offset = Annotated[int, Query(ge=0, le=10**9)]
# Of a search that has not begun, or a study that cannot be read.
UNKNOWN = dict.fromkeys(
    (
        "stage",
        "doing",
        "problem",
        "teacher",
        "profile",
        "targets",
        "created",
        "spent_s",
        "elapsed_s",
        "budget_s",
        "explored",
        "confirmed",
        "front",
    )
)
Page = Callable[..., HTMLResponse]


def mount_pages(app: FastAPI, service: Service) -> None:
    """Add pages, scripts and styles to an application."""
    app.include_router(pages_router(service), include_in_schema=False)
    app.get("/static/plotly.js", include_in_schema=False)(plotly)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")


def plotly() -> FileResponse:
    """plotly.js of the installed package: no network is needed."""
    return FileResponse(
        _plotly_file(), media_type="text/javascript", headers={"cache-control": "private, max-age=86400"}
    )


@lru_cache(maxsize=1)
def _plotly_file() -> Path:
    spec = find_spec("plotly")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "package_data" / "plotly.min.js"


def renderer(service: Service) -> Page:
    """Renders a template; everything in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "minute": minute, "short": short_of, "named": named}

    def render(template: str, **values: Any) -> HTMLResponse:
        shared = {"version": VERSION, "mlflow": service.mlflow_url, "trouble": trouble(service)}
        text = environment.get_template(template).render(**shared, **values)
        return HTMLResponse(printable(text))

    return render


def trouble(service: Service) -> str:
    """What every page says while no search is started; empty if all is well."""
    condition = service.queue.watch()
    told = {"held": "Searches wait", "failing": "Searches are not started", "stopped": "Searches are not started"}
    return f"{told[condition.state]}: {condition.reason}" if condition.state in told else ""


def pages_router(service: Service) -> APIRouter:
    """Routes of the pages."""
    router, render = APIRouter(), renderer(service)

    @router.get("/login")
    def login() -> HTMLResponse:
        return render("login.html")

    @router.get("/")
    def studies(q: Text = "", offset: Offset = 0) -> HTMLResponse:
        found = answers.listed(service, ROWS, offset, q)
        rows = [{**UNKNOWN, **known, **clock(known)} for known in found.studies]
        return render("studies.html", studies=rows, **_paged(found, ROWS, q))

    @router.get("/new")
    def new() -> HTMLResponse:
        return render(
            "new.html",
            choices=choices(service.home),
            others=not_offered(service.home),
            presets=PRESETS,
            spec=Spec.model_validate({}),
        )

    @router.get("/compare")
    def comparison(
        studies: Annotated[str, Query(max_length=2000)] = "",
        candidates: Annotated[str, Query(max_length=2000)] = "",
        q: Text = "",
        offset: Offset = 0,
    ) -> HTMLResponse:
        names = [name for name in studies.split(",") if name]
        pairs = [pair_of(text) for text in candidates.split(",") if text]
        if not names and not pairs:
            found = answers.listed(service, ROWS, offset, q)
            return render(
                "compare.html", names=[], table=None, studies=found.studies, rows=[], **_paged(found, ROWS, q)
            )
        return render("compare.html", **_compared(service, names, pairs))

    @router.get("/studies/{study}")
    def study(study: StudyId, profile: Profile = None) -> HTMLResponse:
        try:
            view = service.studies.view(study)
        except Unknown:
            if service.queue.job(study) is None:
                raise
            return render("waiting.html", study=study, status=_status(service, study))
        return render("study.html", **_study(service, view, profile))

    @router.get("/studies/{study}/chart")
    def chart(study: StudyId, profile: Profile = None) -> dict[str, Any]:
        found = answers.answered(service, service.studies.view(study), profile)
        return chart_data(found.view, found.name, found.kept)

    @router.get("/studies/{study}/report")
    def report(study: StudyId) -> HTMLResponse:
        text = printable(report_html(service.studies.view(study)))
        return HTMLResponse(text, headers={"content-security-policy": REPORT_POLICY})

    @router.get("/studies/{study}/candidates/{key}")
    def candidate(study: StudyId, key: CandidateKey) -> HTMLResponse:
        return render("candidate.html", **_candidate(service, service.studies.view(study), key))

    @router.get("/favicon.ico")
    def icon() -> RedirectResponse:
        return RedirectResponse("/static/icon.svg", 301)

    return router


def _study(service: Service, view: StudyView, profile: str | None) -> dict[str, Any]:
    """What the page of a study shows before any script runs."""
    answer = answers.answered(service, view, profile)
    there = answer.view
    found = compare(view)
    own = named(view.meta.get("profile"))
    try:
        advice = answers.recommendation(service, view, Limits(), None, profile)
    except NothingFeasible as error:
        advice, problem = None, error.problem
    else:
        problem = ""
    columns = [name for name in told(there.figures) if all(measurement(p, name) for p in there.front)]
    return {
        "study": view.study,
        "meta": view.meta,
        "status": _status(service, view.study),
        "summary": {**summary(view), "front": len(there.front), "ties": len(there.ties)},
        "profile": answer.name,
        "own": own,
        "profiles": sorted({own, *(t.name for t in view.targets), *choices(service.home)["profile"]}),
        "kept": {own, *(t.name for t in view.targets)},
        "advice": advice,
        "problem": problem,
        "columns": columns,
        "rows": [_row(there, p, columns) for p in there.front],
        "events": list(reversed(view.events[-LAST_EVENTS:])),
        "failures": failure_counts(view).most_common(20),
        "comparison": found,
        "sliders": slider_ranges(there),
    }


def _paged(found: answers.Listed, rows: int, text: str) -> dict[str, Any]:
    """What the links to the parts before and after need."""
    end = found.offset + len(found.studies)
    return {
        "total": found.total,
        "q": text,
        "first": found.offset + 1,
        "last": end,
        "newer": max(0, found.offset - rows) if found.offset else None,
        "older": end if end < found.total else None,
    }


def _status(service: Service, study: str) -> dict[str, Any]:
    found = status(service, study)
    return {"elapsed_s": None, "stage": None, **found, **clock(found)}


def _row(view: StudyView, point: Any, columns: list[str]) -> dict[str, Any]:
    return {
        "point": point,
        "tied": view.ties.get(point.key),
        "cells": [(m, with_interval(name, m)) for name in columns if (m := measurement(point, name)) is not None],
    }


def _candidate(service: Service, view: StudyView, key: str) -> dict[str, Any]:
    point = answers.find_point(view, key)
    data = answers.candidate(view, key)
    try:
        files = files_of(view, key)
    except Unknown:
        files = []
    from paretune.search.recommend.export import guide

    return {
        "study": view.study,
        "point": point,
        "data": data,
        "measurements": [
            (name, data["labels"][name], m, with_interval(name, m)) for name, m in sorted(point.measurements.items())
        ],
        "files": files,
        "guide": guide(view, point) if files else "",
        "facts": flat(data["facts"]),
        "mlflow_run": mlflow_run(service, view, key),
    }


def mlflow_run(service: Service, view: StudyView, key: str) -> str | None:
    """Address of the candidate's run in the MLflow page beside the service, if both exist."""
    if service.mlflow_url is None:
        return None
    from paretune.tracking.mlflow.addresses import run_page

    return run_page(service.home, service.mlflow_url, view.study, key)


def _compared(service: Service, names: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Columns side by side: studies by their recommendation, candidates by themselves."""
    data = answers.compared(service, names, pairs)
    points = [(v.study, answers.find_point(v, key)) for study, key in pairs for v in [service.studies.view(study)]]
    for name in names:
        view = service.studies.view(name)
        try:
            chosen = answers.recommendation(service, view, Limits(), None, None).chosen
        except ParetuneError:
            chosen = None
        if chosen is not None:
            points.append((name, chosen))
    wanted = list(dict.fromkeys(n for _, p in points for n in told(p.figures)))
    rows = [
        (short_of(name), [(p.measurements.get(name), with_interval(name, measurement(p, name))) for _, p in points])
        for name in wanted
    ]
    return {"names": [s["study"] for s in data["studies"]], "table": points, "rows": rows, "studies": data["studies"]}
