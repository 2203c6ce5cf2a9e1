"""What a submission is checked for before it is stored: everything that needs no teacher in memory."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from paretune.common.command_line import pasted
from paretune.common.errors import UsageError
from paretune.common.text import clean
from paretune.common.validation import said
from paretune.hardware_profiles.profile import load_profile
from paretune.search.estimation.derived_metrics import check_device_specs
from paretune.search.prepare.ready import check_budget
from paretune.search.spec import Spec
from paretune.search.targets.profiles import further_profiles, require_measurable
from paretune.teachers.plugins.name import is_plugin

PROFILE_MATTERS = {"profile", "targets", "objectives", "limits", "precisions"}


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that a search would have, those that were given only. Raises UsageError naming the first wrong one."""
    try:
        return Spec.model_validate(settings).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(clean(str(part)) for part in first["loc"]) or "settings"
        raise UsageError(f"{where}: {said(first)}"[:500], f"change {where}") from None
    except RecursionError:
        raise UsageError("settings are nested too deeply", "send plain settings") from None


def check_plan(settings: dict[str, Any], home: Path) -> None:
    """What of a plan's checks needs no teacher in memory: budget, profiles, figures, precisions. Raises UsageError."""
    spec = Spec.model_validate(settings)
    if problem := not_from_here("this search", settings):
        raise problem
    check_budget(spec, least_parameters(spec.teacher))
    if not PROFILE_MATTERS & settings.keys():
        return
    profile = load_profile(spec.profile, home)
    check_device_specs(spec, profile)
    require_measurable(profile)
    further_profiles(profile.name, spec.targets, spec.teacher, home)
    if missing := spec.choices.missing(profile.weight_formats):
        raise UsageError(
            f"the profile {profile.name} has no kernel for {', '.join(missing)}",
            "leave it out of `precisions`, or add its pair to the profile's weight_formats",
        )


def least_parameters(teacher: str) -> int:
    """Parameters that a teacher has at least, by the size of its files; 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError):
        return sum(path.stat().st_size for path in Path(teacher).glob("*.safetensors")) // 4
    return 0


def not_from_here(study: str, settings: Any) -> UsageError | None:
    """The refusal of a plug-in: it is a program, and what is sent here starts none."""
    teacher = settings.get("teacher") if isinstance(settings, dict) else None
    if not is_plugin(str(teacher)):
        return None
    return UsageError(
        f"a plug-in is started from the command line only, but the teacher of {study} is {teacher!r}",
        f"run `{pasted('resume', study)}` there" if study != "this search" else f"run `{pasted('search')}` there",
    )
