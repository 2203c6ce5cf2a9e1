"""Decoders' candidates out of what may be a decoder's or a module's."""

from __future__ import annotations

from paretune.objectives.prediction.latency_fit import design
from paretune.spaces import Candidate, Space
from paretune.spaces.kinds import AnyCandidate


def decoder(candidate: AnyCandidate | None) -> Candidate:
    assert isinstance(candidate, Candidate)
    return candidate


def decoder_design(space: Space, count: int, seed: int = 0) -> list[Candidate]:
    """`design` of a decoder's space."""
    return [decoder(c) for c in design(space, count, seed)]
