"""The profiles of a study's further targets, checked before any work, and what a prediction for them needs."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from paretune.common.errors import Infeasible, UsageError
from paretune.hardware_profiles.profile import Profile, load_profile
from paretune.objectives.latency.workload import STANDARD, Workload
from paretune.objectives.measurement import Measurement
from paretune.search.spec import Spec
from paretune.spaces.candidate import Candidate, Shape
from paretune.teachers.checkpoint.teacher import load_teacher
from paretune.teachers.plugins.name import is_plugin

Predict = Callable[[Profile, Candidate, Shape], Mapping[str, Measurement]]
# Of the budget: kept back for each further target that this machine can measure, and for all of them at most.
RESERVED_EACH, RESERVED_MOST = 0.05, 0.2
MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "torch": "torch"}


def further_profiles(first: str, names: Iterable[str], teacher: str, home: Path) -> tuple[Profile, ...]:
    """The profiles `names` of further targets beside the profile `first`.

    Raises UsageError for a plug-in, an unknown profile (with the nearest name), and a profile that is named twice.
    """
    found: dict[str, Profile] = {}
    for name in names:
        _refuse_plugin(teacher)
        profile = load_profile(name, home)
        if profile.name in found or profile.name == first:
            raise UsageError(
                f"every target must be named once, but {profile.name!r} is named twice", "leave one of the two out"
            )
        found[profile.name] = profile
    return tuple(found.values())


def require_measurable(profile: Profile, address: str | None = None) -> None:
    """Raises UsageError for a first profile that nothing here measures: not this machine, no agent, no cluster at `address`."""
    if not (profile.at_hand or profile.agent or address):
        raise UsageError(
            f"the first profile is measured, but {profile.name} is only predicted here",
            f"search here and predict it, too: --profile local-cpu --profile {profile.name}; or name its `agent` in the YAML file",
        )


def require_predictions(profiles: Iterable[Profile], candidate: Candidate, shape: Shape) -> None:
    """Raises UsageError for a profile that lacks figures, before a search takes hours; one that is at hand can be measured."""
    for profile in profiles:
        with contextlib.suppress(Infeasible):
            if not is_at_hand(profile):
                roofline()(profile, candidate, shape)


def reserved_share(profiles: Iterable[Profile]) -> float:
    """The share of the budget that is kept back to measure on further targets; predictions take none worth keeping."""
    return min(RESERVED_MOST, RESERVED_EACH * sum(can_measure(p) for p in profiles))


def can_measure(profile: Profile) -> bool:
    """Whether this machine can measure the target: it is at hand, and its engine is installed."""
    return is_at_hand(profile) and missing_engine(profile) is None


def is_at_hand(profile: Profile) -> bool:
    """Whether the target is this machine; one behind an agent is not, whatever its profile says."""
    return profile.at_hand and profile.agent is None


def missing_engine(profile: Profile) -> str | None:
    """The engine of a profile, where it is not installed here."""
    module = MODULES.get(profile.engine)
    return None if module is not None and importlib.util.find_spec(module) is not None else profile.engine


def shape_of(meta: Mapping[str, Any]) -> Shape:
    """The shape of a study's teacher, from the teacher itself.

    Raises UsageError for a plug-in, or if the teacher is gone or is not the one that the study compressed.
    """
    spec, known = Spec.model_validate(meta["spec"]), meta["teacher"]
    _refuse_plugin(spec.teacher)
    teacher = load_teacher(spec.teacher)
    if teacher.digest != known["digest"]:
        raise UsageError(
            f"the study compressed {known['name']} with digest {known['digest']}, but {spec.teacher} now has {teacher.digest}",
            "put the teacher back that the study was made from",
        )
    return teacher.shape


def _refuse_plugin(teacher: str) -> None:
    if is_plugin(teacher):
        raise UsageError(
            f"further targets need predictions, and there are none for modules of plug-ins, but the teacher is {teacher!r}",
            "give one --profile, and search again for another target",
        )


def roofline(turn: Workload = STANDARD) -> Predict:
    """The prediction of objectives/prediction/predict.py after the prompt of `turn`, batch 1."""
    from paretune.objectives.prediction.predict import predict

    return lambda profile, candidate, shape: predict(profile, candidate, shape, prompt=turn.prompt, context=turn.prompt)
