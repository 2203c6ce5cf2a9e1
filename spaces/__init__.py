"""The joint space: candidates, what they decide, and how a sampler sees them."""

from paretune.spaces.candidate import Candidate, Format, Layer, Pattern, Shape
from paretune.spaces.space import Space

__all__ = ["Candidate", "Format", "Layer", "Pattern", "Shape", "Space"]
