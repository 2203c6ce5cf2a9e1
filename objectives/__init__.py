"""What a candidate is judged by: quality on text, latency, memory and bytes, each with unit, interval and provenance."""

from paretune.objectives.latency_fit import FitError, LatencyFit, design
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality import Scores, paired_difference, quality_measurements

__all__ = ["FitError", "LatencyFit", "Measurement", "Scores", "design", "paired_difference", "quality_measurements"]
