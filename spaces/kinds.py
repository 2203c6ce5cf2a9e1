"""The two kinds of candidates, decoders and modules of plug-ins, where the search does not care which it has."""

from __future__ import annotations

import json
from typing import Any

from paretune.spaces.candidate import Candidate, Shape
from paretune.spaces.module_candidate import KIND, ModuleCandidate, ModuleShape
from paretune.spaces.module_space import ModuleSpace
from paretune.spaces.space import Space

AnyCandidate = Candidate | ModuleCandidate
AnyShape = Shape | ModuleShape
AnySpace = Space | ModuleSpace


def candidate_from_dict(data: dict[str, Any]) -> AnyCandidate:
    """The candidate of either kind whose JSON this was."""
    return ModuleCandidate.from_dict(data) if data.get("kind") == KIND else Candidate.from_dict(data)


def candidate_from_json(text: str) -> AnyCandidate:
    """Return the candidate, of either kind, that `to_json` wrote."""
    return candidate_from_dict(json.loads(text))


def params_of(space: AnySpace, candidate: AnyCandidate) -> dict[str, Any]:
    """Sampler parameters of a candidate of this space. Raises ValueError if it has none."""
    if isinstance(space, ModuleSpace):
        assert isinstance(candidate, ModuleCandidate)
        return space.encode(candidate)
    assert isinstance(candidate, Candidate)
    return space.encode(candidate)
