"""What an estimate adds to a rung-0 candidate: latencies by the fit, and what follows from them and from the file's size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paretune.common.errors import UsageError
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.energy import NEEDED, following
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import MetricNames
from paretune.objectives.prediction.memory_fit import MemoryFit, resident_bytes
from paretune.search.spec import Spec
from paretune.search.study.records import Evaluation
from paretune.spaces.kinds import AnyCandidate, AnyShape

MEMORY = "peak_memory_bytes"


def profile_of(meta: Mapping[str, Any] | None) -> Profile | None:
    """The profile of a study; None where its store has none."""
    return Profile.model_validate(meta) if meta else None


def followed(
    latencies: Mapping[str, Measurement], profile: Profile | None, figures: MetricNames
) -> dict[str, Measurement]:
    """The latencies, and for decoders the throughput, energy and cost that follow from them."""
    found = dict(latencies)
    if figures.is_decoder and profile is not None and figures.latency in found:
        found |= following(found[figures.latency], profile)
    return found


def memory_fit(confirmed: Iterable[tuple[AnyCandidate, Evaluation]], shape: AnyShape) -> MemoryFit | None:
    """The line of peak memory over resident bytes; None before the first confirmation that measured it."""
    points = [
        (resident_bytes(candidate, shape, e.measurements["bytes"].value), e.measurements[MEMORY].value)
        for candidate, e in confirmed
        if "bytes" in e.measurements and MEMORY in e.measurements and e.measurements[MEMORY].value > 0
    ]
    return MemoryFit(points) if points else None


def check_device_specs(spec: Spec, profile: Profile) -> None:
    """Raises UsageError for an objective or limit that needs a figure which the profile lacks."""
    for name in (*spec.objectives, *spec.limits):
        needed = NEEDED.get(name)
        if needed is not None and not getattr(profile, needed):
            raise UsageError(
                f"{name} needs {needed} of the profile, more than 0, but {profile.name} has {getattr(profile, needed)}",
                f"write {needed} into its YAML file, or leave {name} out",
            )
