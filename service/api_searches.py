"""What changes something: submit a search and steer it; and what a submission may say."""

from __future__ import annotations

import threading
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response

from paretune import __version__
from paretune.search.advice import GOALS
from paretune.search.spec import PRESETS, Spec
from paretune.service.allowed import choices, resolved
from paretune.service.api_models import Choices, Health, JobModel, Nothing, Planned, Submission
from paretune.service.job import LIVE
from paretune.service.queue import check_settings
from paretune.service.state import Service

StudyId = Annotated[str, Path(max_length=100, description="A study's id.")]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=200,
        description="The same key and settings are the same search, however often they are sent.",
    ),
]


def searches_router(service: Service) -> APIRouter:
    """Routes of /v1 about searches."""
    router, planning = APIRouter(), threading.Lock()

    @router.get("/health")
    def health() -> Health:
        """Whether the service answers; needs no token."""
        states = [job.state for job in service.queue.jobs()]
        running = sum(state in LIVE for state in states)
        return Health(status="ok", version=__version__, running=running, queued=states.count("queued"))

    @router.get("/choices")
    def names() -> Choices:
        """What a submission's settings may name, with their schema."""
        schema = Spec.model_json_schema()
        return Choices(**choices(service.home), presets=PRESETS, goals=list(GOALS), settings_schema=schema)

    @router.post("/plan")
    def plan(asked: Planned) -> dict[str, Any]:
        """What a search with these settings would cost, as `paretune search --dry-run`; nothing is started."""
        from paretune.search.prepare import prepare

        settings = check_settings(resolved(asked.spec, service.home))
        with planning:  # a plan loads the teacher: one at a time
            return dict(prepare(Spec.model_validate(settings), service.home).plan.__dict__)

    @router.post("/studies", status_code=201, responses={200: {"model": JobModel, "description": "known by its key"}})
    def submit(asked: Submission, response: Response, key: Key = None) -> JobModel:
        """Put a search into the queue."""
        job, new = service.queue.submit(resolved(asked.spec, service.home), key, asked.name)
        response.status_code = 201 if new else 200
        response.headers["Location"] = f"/v1/studies/{job.study}"
        return JobModel.of(job)

    @router.get("/queue")
    def queue() -> list[JobModel]:
        """All searches that this service was asked for, oldest first."""
        return [JobModel.of(job) for job in service.queue.jobs()]

    @router.post("/studies/{study}/pause")
    def pause(study: StudyId, _: Nothing) -> JobModel:
        """Finish what runs, then wait; the budget waits too."""
        return JobModel.of(service.queue.pause(study))

    @router.post("/studies/{study}/resume")
    def resume(study: StudyId, _: Nothing) -> JobModel:
        """Go on with a search that rests: it waits in the queue again."""
        return JobModel.of(service.queue.resume(study))

    @router.post("/studies/{study}/stop")
    def stop(study: StudyId, _: Nothing) -> JobModel:
        """Finish what runs, then end: the study is complete."""
        return JobModel.of(service.queue.stop(study))

    @router.post("/studies/{study}/cancel")
    def cancel(study: StudyId, _: Nothing) -> JobModel:
        """End it now; what was confirmed stays usable."""
        return JobModel.of(service.queue.cancel(study))

    return router
