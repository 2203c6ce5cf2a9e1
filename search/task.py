"""What the director hands out and what a worker gives back; both travel through Ray as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from paretune.common.errors import ParetuneError
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores
from paretune.spaces.kinds import AnyCandidate, candidate_from_dict

Kind = Literal["fit", "elastic", "sensitivity", "rung0", "recover", "confirm"]


@dataclass(frozen=True)
class Task:
    """One Tune trial. `seconds_left` is how much of the budget remains; `timeout_s` after how long the worker gives itself up."""

    kind: Kind
    candidate: AnyCandidate | None = None
    seconds_left: float = 0.0
    timeout_s: float = 600.0
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the task as JSON; `from_json` reads it back."""
        data = asdict(self)
        data["candidate"] = None if self.candidate is None else json.loads(self.candidate.to_json())
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Return the task that `to_json` wrote."""
        data = json.loads(text)
        candidate = data.pop("candidate")
        return cls(candidate=None if candidate is None else candidate_from_dict(candidate), **data)


@dataclass(frozen=True)
class Outcome:
    """What came of a piece of work. `done` is False for a report on the way; "fatal" ends the search with `exit_code`."""

    status: Literal["complete", "failed", "infeasible", "fatal"] = "complete"
    done: bool = True
    measurements: dict[str, Measurement] = field(default_factory=dict)
    scores: Scores | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    exit_code: int = 0
    artifact: tuple[str, str] | None = None

    def to_json(self) -> str:
        """Return the outcome as JSON; `from_json` reads it back."""
        data = asdict(self)
        data["scores"] = None if self.scores is None else self.scores.__dict__
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """Return the outcome that `to_json` wrote."""
        data = json.loads(text)
        data["measurements"] = {name: Measurement.from_dict(m) for name, m in data["measurements"].items()}
        data["scores"] = None if data["scores"] is None else Scores.from_dict(data["scores"])
        data["artifact"] = None if data["artifact"] is None else (data["artifact"][0], data["artifact"][1])
        return cls(**data)


def fatal(error: ParetuneError) -> Outcome:
    """The outcome that ends the search with the error's exit code; the remedy is kept apart from the reason."""
    return Outcome("fatal", reason=error.problem, exit_code=error.exit_code, facts={"remedy": error.remedy})
