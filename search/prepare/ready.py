"""A search that was checked and can start, and what its budget, disk and memory must allow."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.common.errors import DiskProblem, EnvironmentProblem, Shortage, UsageError
from paretune.common.memory import all_memory
from paretune.common.version import VERSION
from paretune.hardware_profiles import fingerprint
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.metric_names import MetricNames
from paretune.search.layout import Layout, layout_of
from paretune.search.prepare.plan import Plan
from paretune.search.spec import Spec
from paretune.search.targets.profiles import reserved_share
from paretune.spaces.kinds import AnySpace
from paretune.teachers.checkpoint.teacher import Teacher

if TYPE_CHECKING:
    from paretune.teachers.plugins.plugin import PluginTeacher

MIN_BUDGET_S = 45.0


@dataclass(frozen=True)
class PluginSetup:
    """What a study of a plug-in adds: the names of its figures, and the folder in which its class is looked up too."""

    figures: MetricNames
    folder: Path


@dataclass(frozen=True)
class Ready:
    """Everything that was checked before work starts."""

    spec: Spec
    teacher: Teacher | PluginTeacher
    profile: Profile
    space: AnySpace
    plan: Plan
    text: str = ""
    plugin: PluginSetup | None = None
    targets: tuple[Profile, ...] = ()

    @property
    def search_s(self) -> float:
        """Seconds of the budget for the search itself; the rest is for measuring on further targets that are at hand."""
        return self.spec.budget_s * (1 - reserved_share(self.targets))

    def layout(self, address: str | None = None) -> Layout:
        """How many tasks run at once; `address` is that of a Ray cluster. Raises UsageError if there are too few cores."""
        return layout_of(self.spec, self.profile, address)

    @property
    def identity(self) -> str:
        """12 hex digits over everything that must not change inside a study: settings, teacher, text, profile, machine, versions."""
        parts = (
            self.spec.digest(),
            self.teacher.digest,
            self.text,
            self.profile.model_dump_json(),
            fingerprint(),
            VERSION,
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def check_budget(spec: Spec, parameters: int) -> None:
    """Raises UsageError if the budget is too small for the baselines of a teacher with so many parameters."""
    least = MIN_BUDGET_S * max(1.0, parameters / 6e6)
    if spec.budget_s < least:
        raise UsageError(
            f"the budget must be at least {least:.0f} s, because the baselines alone take that long, but got {spec.budget}",
            f"use --budget {math.ceil(least / 60)}m or more",
        )


def check_affordable(plan: Plan, spec: Spec, home: Path) -> None:
    """Raises UsageError if the budget is too small for the baselines, EnvironmentProblem if disk or memory do not suffice: a Shortage
    where they would if others used less of them."""
    check_budget(spec, plan.parameters)
    if plan.disk_bytes > plan.free_disk_bytes:
        kind = DiskProblem if plan.disk_bytes < shutil.disk_usage(home).total else EnvironmentProblem
        raise kind(
            f"the search needs about {plan.disk_bytes / 1e9:.1f} GB of disk, but {home} has {plan.free_disk_bytes / 1e9:.1f} GB free",
            "free some, or choose another disk with --home",
        )
    if plan.memory_bytes > plan.free_memory_bytes:
        kind = Shortage if plan.memory_bytes < all_memory() else EnvironmentProblem
        raise kind(
            f"a search on {plan.parameters / 1e6:.0f}M parameters needs about {plan.memory_bytes / 1e9:.1f} GB of memory, but "
            f"{plan.free_memory_bytes / 1e9:.1f} GB are free",
            "end other programs, take a larger machine or a smaller teacher",
        )
