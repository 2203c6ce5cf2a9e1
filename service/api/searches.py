"""What changes something: submit a search and steer it; and what a submission may say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from fastapi import Path as PathPart

from paretune.common.errors import EnvironmentProblem
from paretune.common.version import VERSION
from paretune.search.recommend.advice import GOALS
from paretune.search.spec import PRESETS, Spec
from paretune.service.api.allowed import choices, not_offered, resolved
from paretune.service.api.models import Choices, Health, JobModel, Nothing, Planned, Submission
from paretune.service.queue.checks import check_settings
from paretune.service.queue.hold import Condition
from paretune.service.queue.job import LIVE
from paretune.service.state import Service
from paretune.service.work import OneAtATime, Quick

HEALTH_S = 2.0  # Docker's check waits 4 s
StudyId = Annotated[str, PathPart(max_length=100, description="A study's id.")]
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
    router = APIRouter()
    planning, looking = OneAtATime("plan"), Quick("the queue", HEALTH_S)

    @router.get("/health", responses={503: {"model": Health, "description": "no search is started"}})
    async def health(response: Response) -> Health:
        """Whether the service answers and starts searches, and if not, why; needs no token."""
        condition = service.queue.watch()
        try:
            states = [job.state for job in await looking.run(service.queue.jobs)]
        except EnvironmentProblem as error:
            states, condition = [], Condition("failing", f"the queue cannot be read ({type(error).__name__})")
        if condition.state in ("failing", "stopped"):
            response.status_code = 503
        return Health(
            status="ok" if condition.state == "off" else condition.state,
            problem=condition.reason,
            version=VERSION,
            running=sum(state in LIVE for state in states),
            queued=states.count("queued"),
        )

    @router.get("/choices")
    def names() -> Choices:
        """What a submission's settings may name, with their schema."""
        return Choices(
            **choices(service.home),
            not_offered=not_offered(service.home),
            presets=PRESETS,
            goals=list(GOALS),
            settings_schema=Spec.model_json_schema(),
        )

    @router.post("/plan")
    async def plan(asked: Planned) -> dict[str, Any]:
        """What a search with these settings would cost, as `paretune search --dry-run`; nothing is started. It loads the teacher,
        so one is made at a time: another is refused with 429 and Retry-After."""
        return await planning.run(lambda: planned(asked.spec, service.home))

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


def planned(spec: dict[str, Any], home: Path) -> dict[str, Any]:
    """The plan of a search. Raises as `paretune search` does."""
    from paretune.search.prepare.prepare import prepare

    settings = check_settings(resolved(spec, home))
    return dict(prepare(Spec.model_validate(settings), home).plan.__dict__)
