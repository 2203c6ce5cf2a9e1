"""What the HTTP interface takes and tells, as far as it has a fixed form; points and comparisons are as the command line's JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from paretune.service.queue.job import Job, State

Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$", description="A study's id.")]


class Problem(BaseModel):
    """Why a request was refused: the rule with the value, and what to do."""

    error: str
    remedy: str = ""


class Submission(BaseModel):
    """A search: `spec` has the settings of a search's file, by names that /v1/choices lists; `name` becomes the study's id."""

    model_config = ConfigDict(extra="forbid")

    spec: dict[str, Any] = Field(default_factory=dict)
    name: Id | None = None


class Planned(BaseModel):
    """Settings whose cost is asked for."""

    model_config = ConfigDict(extra="forbid")

    spec: dict[str, Any] = Field(default_factory=dict)


class Nothing(BaseModel):
    """An empty JSON object: what changes something is sent as JSON even if there is nothing to say."""

    model_config = ConfigDict(extra="forbid")


class Token(BaseModel):
    """What `paretune serve` has printed."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(max_length=512)


class JobModel(BaseModel):
    """A search in the queue; times in UTC, `position` is 1 for the next one and 0 for one that does not wait."""

    study: str
    state: State
    settings: dict[str, Any]
    attempts: int
    created: str
    started: str
    ended: str
    reason: str
    position: int

    @classmethod
    def of(cls, job: Job) -> JobModel:
        """Return the model of a job in the queue."""
        return cls(**job.to_dict())


class Health(BaseModel):
    """`ok`: the service answers, reads its home and starts searches. `held`: searches wait, because the machine lacks what `problem`
    says. `failing`, `stopped`: nothing is started, and `problem` says why; these answer 503. A service that only shows is `ok`.
    """

    status: Literal["ok", "held", "failing", "stopped"]
    problem: str = ""
    version: str
    running: int
    queued: int


class StudyModel(BaseModel):
    """How a study stands. `job` is None for one that a command line runs."""

    model_config = ConfigDict(extra="allow")

    study: str
    state: str
    job: JobModel | None = None


class File(BaseModel):
    """A file of an artifact, to be had from /v1/artifacts/SHA256."""

    name: str
    sha256: str
    bytes: int


class Artifact(BaseModel):
    """The files of a confirmed candidate; `run` says how it is run."""

    key: str
    files: list[File]
    run: str


class Page(BaseModel):
    """A part of a study's candidates; `total` counts all of them."""

    study: str
    total: int
    offset: int
    candidates: list[dict[str, Any]]


class Choices(BaseModel):
    """Names that settings may have, what lies beside them and cannot be named (with the reason), the settings' JSON schema, and the
    presets."""

    teacher: list[str]
    data: list[str]
    profile: list[str]
    not_offered: list[str]
    presets: dict[str, dict[str, Any]]
    goals: list[str]
    settings_schema: dict[str, Any]
