"""What only reads: studies, fronts, candidates, recommendations, comparisons, artifacts, profiles, progress."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from paretune.common.errors import UsageError
from paretune.hardware_profiles.profile import load_profile
from paretune.search.recommend.recommend import Limits
from paretune.service.api import answers
from paretune.service.api.allowed import known_profiles
from paretune.service.api.artifacts import files_of, find_file
from paretune.service.api.events import Streams, clock, followed, progress, require_known
from paretune.service.api.models import Artifact, JobModel, Page, Problem, StudyModel
from paretune.service.printable import Json
from paretune.service.queue.job import Unknown, shown_state
from paretune.service.state import Service

StudyId = Annotated[str, Path(max_length=100, description="A study's id.")]
CandidateKey = Annotated[str, Path(max_length=64, description="A candidate's key.")]
Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of a file.")]
Profile = Annotated[str | None, Query(max_length=100, description="A profile's name; the searched one if left out.")]
Positive = Annotated[float | None, Query(gt=0, allow_inf_nan=False)]
SEVERAL = r"^[A-Za-z0-9._-]+(,[A-Za-z0-9._-]+){0,49}$"
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "events"}
}
LISTED: dict[int | str, dict[str, Any]] = {
    200: {"headers": {"X-Total-Count": {"schema": {"type": "integer"}}, "Link": {"schema": {"type": "string"}}}},
    304: {"description": "unchanged since the ETag of If-None-Match"},
}
Goal = Annotated[
    str | None,
    Query(max_length=20, description="balanced, fastest, quality or smallest; else what the limits suggest."),
]


def studies_router(service: Service) -> APIRouter:
    """Routes of /v1 about studies."""
    router, streams = APIRouter(), Streams()

    @router.get("/studies", response_model=list[StudyModel], responses=LISTED)
    def studies(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=answers.MOST_LISTED, description="At most so many.")] = answers.LISTED,
        offset: Annotated[int, Query(ge=0, le=10**9, description="So many are left out.")] = 0,
        q: Annotated[str, Query(max_length=100, description="Only studies with this text in their id.")] = "",
    ) -> Response:
        """Studies of the home, and searches without one: those that run or wait first, then the one that changed last. The header
        X-Total-Count has the number of all, Link the next part; with If-None-Match an unchanged list is answered with 304."""
        return _listed(request, answers.listed(service, limit, offset, q), limit)

    @router.get("/studies/{study}")
    def study(study: StudyId) -> StudyModel:
        """How a study stands."""
        job = service.queue.job(study)
        model = None if job is None else JobModel.of(job)
        try:
            told = service.studies.standing(study).told
            told = {**told, "state": shown_state(job, told["state"])}
            return StudyModel(**told, **clock(told), job=model)
        except Unknown:
            if model is None:
                raise
            return StudyModel(study=study, state=model.state, job=model)

    @router.get("/studies/{study}/events", response_class=StreamingResponse, responses=EVENTS)
    def events(study: StudyId) -> StreamingResponse:
        """Progress as server-sent events: `status` when something has changed, `end` when nothing will."""
        require_known(service, study)
        streams.require_room()
        return StreamingResponse(progress(service, [study], streams), media_type="text/event-stream")

    @router.get("/events", response_class=StreamingResponse, responses=EVENTS)
    def all_events(
        studies: Annotated[
            str, Query(max_length=4000, pattern=SEVERAL, description="Up to 50 ids, separated by commas.")
        ],
    ) -> StreamingResponse:
        """Progress of several studies in one stream: `status` when one has changed, `end` when one will not any more."""
        names = followed(service, studies)
        streams.require_room()
        return StreamingResponse(progress(service, names, streams), media_type="text/event-stream")

    @router.get("/studies/{study}/front")
    def front(study: StudyId, profile: Profile = None) -> dict[str, Any]:
        """The confirmed candidates that nothing dominates, best quality first."""
        return answers.front(service, service.studies.view(study), profile)

    @router.get("/studies/{study}/candidates")
    def candidates(
        study: StudyId,
        kind: Annotated[answers.Kind, Query()] = "confirmed",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    ) -> Page:
        """Candidates in the order of their proposal: confirmed ones, or the estimates of rung 0."""
        return Page(**answers.candidates(service.studies.view(study), kind, limit, offset))

    @router.get("/studies/{study}/candidates/{key}")
    def candidate(study: StudyId, key: CandidateKey) -> dict[str, Any]:
        """One candidate with its measurements and its row of the regret matrix."""
        return answers.candidate(service.studies.view(study), key)

    @router.get("/studies/{study}/candidates/{key}/artifact")
    def artifact(study: StudyId, key: CandidateKey) -> Artifact:
        """The files of a confirmed candidate and how to run it."""
        from paretune.search.recommend.export import guide

        view = service.studies.view(study)
        files = files_of(view, key)
        return Artifact(key=key, files=files, run=guide(view, answers.find_point(view, key)))

    @router.get("/studies/{study}/recommendation")
    def recommendation(
        study: StudyId,
        goal: Goal = None,
        profile: Profile = None,
        max_latency_ms: Positive = None,
        max_bytes: Positive = None,
        max_memory_bytes: Positive = None,
        max_loss: Positive = None,
        min_throughput: Positive = None,
        max_energy_j: Positive = None,
        max_cost_usd: Positive = None,
    ) -> dict[str, Any]:
        """The candidate to take, with reasons; limits that nothing keeps are an answer too (`feasible`: false)."""
        limits = Limits(
            max_latency_ms, max_bytes, max_memory_bytes, max_loss, min_throughput, max_energy_j, max_cost_usd
        )
        found = answers.recommendation(service, service.studies.view(study), limits, goal, profile)
        told = found.to_dict()
        key = None if found.chosen is None else found.chosen.key
        return {**told, "artifact": key and f"/v1/studies/{study}/candidates/{key}/artifact"}

    @router.get("/studies/{study}/targets")
    def targets(study: StudyId) -> dict[str, Any]:
        """All targets of the study side by side, with the regret matrices."""
        return answers.targets(service.studies.view(study))

    @router.get("/compare")
    def compare(
        studies: Annotated[str, Query(max_length=2000, description="Ids, separated by commas.")] = "",
        candidates: Annotated[str, Query(max_length=2000, description="id:key, separated by commas.")] = "",
    ) -> dict[str, Any]:
        """Studies or candidates side by side."""
        names = [name for name in studies.split(",") if name]
        pairs = [pair_of(text) for text in candidates.split(",") if text]
        return answers.compared(service, names, pairs)

    @router.get(
        "/artifacts/{digest}",
        response_class=FileResponse,
        responses={200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}},
    )
    def file(digest: Digest) -> FileResponse:
        """A file of some artifact, by its digest only."""
        path, name = find_file(service.studies, digest)
        return FileResponse(path, media_type="application/octet-stream", filename=name)

    @router.get("/profiles")
    def profiles() -> list[str]:
        """Names of the target machines that are known here."""
        return known_profiles(service.home)

    @router.get("/profiles/{name}", responses={404: {"model": Problem, "description": "no profile has this name"}})
    def profile(name: Annotated[str, Path(max_length=100)]) -> dict[str, Any]:
        """A target machine: every figure with its source."""
        if name not in known_profiles(service.home):
            raise Unknown("no profile has this name", "look at /v1/profiles")
        return load_profile(name, service.home).model_dump(mode="json")

    return router


def _listed(request: Request, found: answers.Listed, limit: int) -> Response:
    """The list as JSON with its headers, or 304 if the client has it already."""
    told = [
        StudyModel(**{**s, "job": None if s["job"] is None else JobModel.of(s["job"])}).model_dump(mode="json")
        for s in found.studies
    ]
    answer: Response = Json(told)
    tag = f'"{hashlib.sha256(bytes(answer.body)).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == tag:
        answer = Response(status_code=304)
    answer.headers["ETag"] = tag
    answer.headers["X-Total-Count"] = str(found.total)
    if found.offset + limit < found.total:
        following = request.url.include_query_params(offset=found.offset + limit, limit=limit)
        answer.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return answer


def pair_of(text: str) -> tuple[str, str]:
    """(study, key) of `id:key`. Raises UsageError."""
    study, colon, key = text.partition(":")
    if not (study and colon and key):
        raise UsageError(f"a candidate is named id:key, but got {text[:100]!r}", "separate several by commas")
    return study, key
