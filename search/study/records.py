"""Rows of a study as values: candidates, evaluations, events."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any, Literal

from paretune.common.text import loads
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores
from paretune.spaces.kinds import AnyCandidate

Fidelity = Literal["rung0", "recovered", "confirmed"]
Status = Literal["running", "complete", "failed", "infeasible", "lost"]


@dataclass(frozen=True)
class CandidateRow:
    """A proposed candidate. `number` counts proposals from 0; `source` is "baseline", "seed" or "sampler"."""

    key: str
    number: int
    source: str
    candidate: AnyCandidate
    params: dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """One attempt to evaluate a candidate at a fidelity. `facts` say how (tokens, weights file, seconds per step …)."""

    key: str
    fidelity: Fidelity
    status: Status
    attempt: int
    measurements: dict[str, Measurement]
    scores: Scores | None
    facts: dict[str, Any]
    reason: str
    seconds: float
    at: str


@dataclass(frozen=True)
class Event:
    """Something an operator would want to read in the morning."""

    at: str
    kind: str
    text: str
    data: dict[str, Any] = field(default_factory=dict)


def now() -> str:
    """This moment in UTC as ISO text."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def evaluation_of(row: Any) -> Evaluation:
    """A row of the evaluation table as a value."""
    scores = loads(row.scores)
    return Evaluation(
        row.key,
        row.fidelity,
        row.status,
        row.attempt,
        {n: Measurement.from_dict(m) for n, m in loads(row.measurements).items()},
        None if scores is None else Scores.from_dict(scores),
        loads(row.facts),
        row.reason,
        row.seconds,
        row.at,
    )
