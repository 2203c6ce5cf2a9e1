"""A search that somebody asked the service for, as a value; and the errors of asking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from paretune.common.errors import ParetuneError, UsageError

State = Literal[
    "queued", "running", "pausing", "paused", "stopping", "cancelling", "cancelled", "complete", "failed", "unreadable"
]
STATES: tuple[State, ...] = get_args(State)
LIVE: tuple[State, ...] = ("running", "pausing", "stopping", "cancelling")
ENDED: tuple[State, ...] = ("cancelled", "complete", "failed")


@dataclass(frozen=True)
class Job:
    """`study` is the study's id; `attempts` counts starts after a crash; times are ISO texts in UTC, "" where there is none.

    `position` is the place in the queue (1: next), 0 where it does not wait. "unreadable" is a row of the queue that cannot be
    read: it is never started, and can be cancelled.
    """

    study: str
    state: State
    settings: dict[str, Any]
    client_key: str | None = None
    attempts: int = 0
    created: str = ""
    started: str = ""
    ended: str = ""
    reason: str = ""
    position: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data, without the client's key."""
        return {name: value for name, value in self.__dict__.items() if name != "client_key"}


def shown_state(job: Job | None, study: str | None) -> str:
    """What people are shown: the job's state while it waits, runs or has failed, else what the study's own store says (`study`): a
    command line may have gone on with it since."""
    if job is None or study is None:
        return str(job.state if job is not None else study)
    if job.state in (*LIVE, "queued") or (job.state == "failed" and study in ("new", "interrupted")):
        return job.state
    return study


class Conflict(UsageError):
    """A client's key or a study's name was used before, for something else."""


class QueueFull(UsageError):
    """More searches wait than the service takes."""


class Busy(QueueFull):
    """Work of this kind is being done already; the client tries again."""


class WrongToken(UsageError):
    """What was sent at the login is not the service's token."""


class Unknown(ParetuneError):
    """There is no such study, job, candidate, profile or file."""

    exit_code = 2
