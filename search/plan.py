"""What a search will cost, told before it starts."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.hardware_profiles.profile import Profile
from paretune.search.spec import Spec
from paretune.spaces.kinds import AnySpace
from paretune.teachers import Teacher

if TYPE_CHECKING:
    from paretune.teachers.plugin import PluginTeacher

ARTIFACT_COPIES = 2.5


@dataclass(frozen=True)
class Plan:
    """What a search will cost, told before it starts (`--dry-run`)."""

    teacher: str
    parameters: int
    profile: str
    space_size: int
    text: dict[str, int]
    budget_s: float
    seconds: dict[str, float]
    expected_candidates: int
    expected_finalists: int
    disk_bytes: int
    free_disk_bytes: int
    memory_bytes: int
    free_memory_bytes: int
    notes: tuple[str, ...]
    most_finalists: int = 0
    text_what: str = "text"
    text_unit: str = "characters"


def training_tokens_per_parameter(spec: Spec, teacher: Teacher, profile: Profile) -> float:
    """What the elastic student's share of the budget can train, by the speed seen on two cores (3,500 tokens/s at 5.8M)."""
    speed = 3500 * (5.77e6 / teacher.parameters) * profile.cores / 2
    return spec.budget_s * spec.shares.elastic * speed / teacher.parameters


def make_plan(
    spec: Spec,
    teacher: Teacher | PluginTeacher,
    profile: Profile,
    space: AnySpace,
    characters: dict[str, int],
    home: Path,
    notes: list[str],
) -> Plan:
    """Rough costs, scaled from the embedded teacher on two cores."""
    scale = max(0.1, teacher.parameters / 5.77e6) * 2 / max(1, profile.cores)
    seconds = {
        "baselines": 3 * (4 + 4 * scale * spec.report_tokens / 40_000),
        "latency fit": spec.fit_points * (0.7 + 0.4 * scale),
        **({"elastic student": spec.budget_s * spec.shares.elastic} if space.has_elastic else {"training speed": 2.0}),
    }
    left = max(0.0, spec.budget_s - sum(seconds.values()))
    seconds["explore"] = left * spec.shares.explore / (spec.shares.explore + spec.shares.confirm)
    seconds["recover and confirm"] = left - seconds["explore"]
    per_candidate = 0.25 + 1.0 * scale * spec.search_tokens / 24_000
    size = teacher.parameters * 4
    return Plan(
        teacher.name,
        teacher.parameters,
        profile.name,
        space.size(),
        characters,
        spec.budget_s,
        {k: round(v, 1) for k, v in seconds.items()},
        min(spec.max_candidates, int(seconds["explore"] / per_candidate)),
        spec.finalists,
        int(size * ARTIFACT_COPIES * (spec.finalists * 1.5 + 4) + 600e6),
        shutil.disk_usage(_existing(home)).free,
        int(size * 12 + 2.5e9),
        _available_memory(),
        tuple(notes),
        spec.most_finalists,
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize
