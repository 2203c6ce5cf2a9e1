"""What only reads: studies, fronts, candidates, recommendations, comparisons, artifacts, profiles, progress."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import FileResponse, StreamingResponse

from paretune.hardware_profiles.errors import UsageError
from paretune.hardware_profiles.profile import load_profile, profile_names
from paretune.search.recommend import Limits
from paretune.service import answers
from paretune.service.api_models import Artifact, JobModel, Page, Problem, StudyModel
from paretune.service.artifacts import files_of, find_file
from paretune.service.data import summary
from paretune.service.events import Streams, progress
from paretune.service.job import QueueFull, Unknown, shown_state
from paretune.service.state import Service

StudyId = Annotated[str, Path(max_length=100, description="A study's id.")]
CandidateKey = Annotated[str, Path(max_length=64, description="A candidate's key.")]
Digest = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of a file.")]
Profile = Annotated[str | None, Query(max_length=100, description="A profile's name; the searched one if left out.")]
Positive = Annotated[float | None, Query(gt=0, allow_inf_nan=False)]
Goal = Annotated[
    str | None,
    Query(max_length=20, description="balanced, fastest, quality or smallest; else what the limits suggest."),
]


def studies_router(service: Service) -> APIRouter:
    """Routes of /v1 about studies."""
    router, streams = APIRouter(), Streams()

    @router.get("/studies")
    def studies() -> list[StudyModel]:
        """All studies of the home, and searches that wait, the newest first."""
        return [
            StudyModel(**{**told, "job": None if told["job"] is None else JobModel.of(told["job"])})
            for told in answers.listed(service)
        ]

    @router.get("/studies/{study}")
    def study(study: StudyId) -> StudyModel:
        """How a study stands."""
        job = service.queue.job(study)
        model = None if job is None else JobModel.of(job)
        try:
            told = summary(service.studies.view(study))
            return StudyModel(**{**told, "state": shown_state(job, told["state"])}, job=model)
        except Unknown:
            if model is None:
                raise
            return StudyModel(study=study, state=model.state, job=model)

    @router.get(
        "/studies/{study}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "events"}},
    )
    def events(study: StudyId) -> StreamingResponse:
        """Progress as server-sent events: `status` when something has changed, `end` when nothing will."""
        if service.queue.job(study) is None:
            service.studies.known(study)
        if streams.is_full:
            raise QueueFull("too many streams are open", "close some")
        return StreamingResponse(progress(service, study, streams), media_type="text/event-stream")

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
        from paretune.search.export import guide

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
        return profile_names(service.home)

    @router.get("/profiles/{name}", responses={404: {"model": Problem, "description": "no profile has this name"}})
    def profile(name: Annotated[str, Path(max_length=100)]) -> dict[str, Any]:
        """A target machine: every figure with its source."""
        if name not in profile_names(service.home):
            raise Unknown("no profile has this name", "look at /v1/profiles")
        return load_profile(name, service.home).model_dump(mode="json")

    return router


def pair_of(text: str) -> tuple[str, str]:
    """(study, key) of `id:key`. Raises UsageError."""
    study, colon, key = text.partition(":")
    if not (study and colon and key):
        raise UsageError(f"a candidate is named id:key, but got {text[:100]!r}", "separate several by commas")
    return study, key
