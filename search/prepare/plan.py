"""What a search will cost, told before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paretune.common.memory import available_memory
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.quality.batching import WINDOW, batch_within_memory
from paretune.search.estimation.costs import CONFIRM_GUESS_S
from paretune.search.layout import Layout
from paretune.search.sensitivity_budget import affordable_tokens, expected_seconds
from paretune.search.spec import Spec
from paretune.spaces.kinds import AnySpace
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import Teacher

if TYPE_CHECKING:
    from paretune.teachers.plugins.plugin import PluginTeacher

# Bytes over those of the teacher's weights: of a finalist (recovered weights, artifact, for every second one a copy in MLflow), of
# a baseline, of what is there once (elastic student with its optimizers' state).
FINALIST_COPIES, BASELINE_COPIES, OTHER_COPIES = 3.0, 2.0, 3.0
BASELINES = 3
# Driver, Ray's daemons, an empty worker and its libraries.
EMPTY_SEARCH_BYTES = 2_200_000_000
# One more worker and its libraries.
WORKER_BYTES = 900_000_000
# Copies of all weights that training holds: teacher, parameters, gradients, momentum, fake-quantized, and in bfloat16.
WEIGHT_COPIES, TABLE_COPIES, LOGIT_COPIES = 7.0, 2.0, 5.0
TRAINING_BATCH = 6


@dataclass(frozen=True)
class Plan:
    """What a search will cost, told before it starts (`--dry-run`).

    `read` is what of --data is read, and what is left out and why; `layout` is how many workers there are.
    """

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
    tokens_per_parameter: float = 0.0
    mild: bool = False
    text_what: str = "text"
    text_unit: str = "characters"
    read: tuple[str, ...] = ()
    layout: str = ""


def memory_needed(teacher: Teacher) -> int:
    """Peak bytes of the whole search on this machine: while a finalist is trained, or while the elastic student is.

    A sum over copies of the weights, of embedding and head, and of a batch of logits; docs/log.md has it beside measured ones.
    """
    shape = teacher.shape
    window = min(WINDOW, teacher.context)
    logits = batch_within_memory(TRAINING_BATCH, window, shape) * window * shape.vocab
    tables = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    numbers = WEIGHT_COPIES * teacher.parameters + TABLE_COPIES * tables + LOGIT_COPIES * logits
    return int(EMPTY_SEARCH_BYTES + 4 * numbers)


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
    layout: Layout,
    local: bool = True,
) -> Plan:
    """Rough costs, scaled from the embedded teacher on two cores. A stage's seconds are those of the wall clock.

    `local`: whether the workers run on this machine, whose memory they then need.
    """
    scale = max(0.1, teacher.parameters / 5.77e6) * 2 / layout.threads
    seconds = {
        "baselines": 3 * (4 + 4 * scale * spec.report_tokens / 40_000),
        "latency fit": spec.fit_points * (0.7 + 0.4 * scale),
        **({"elastic student": spec.budget_s * spec.shares.elastic} if space.has_elastic else {"training speed": 2.0}),
    }
    if isinstance(space, Space) and isinstance(teacher, Teacher) and space.has_mixed:
        formats = len(space.mixed_formats)
        tokens = affordable_tokens(teacher.shape, formats, spec.budget_s, profile.cores)
        seconds["sensitivity"] = expected_seconds(teacher.shape, formats, tokens, profile.cores)
    size = teacher.parameters * 4
    left = max(0.0, spec.budget_s - sum(seconds.values()))
    seconds["explore"] = left * spec.shares.explore / (spec.shares.explore + spec.shares.confirm)
    memory = memory_needed(teacher) if isinstance(teacher, Teacher) else int(EMPTY_SEARCH_BYTES + size * WEIGHT_COPIES)
    seconds["recover and confirm"] = left - seconds["explore"]
    per_candidate = (0.25 + 1.0 * scale * spec.search_tokens / 24_000) / layout.workers
    per_finalist = CONFIRM_GUESS_S * scale * max(0.5, spec.report_tokens / 40_000) + 2 * per_candidate
    finalists = max(1, int(seconds["recover and confirm"] / per_finalist))
    copies = FINALIST_COPIES * min(2 * spec.finalists, finalists) + BASELINE_COPIES * BASELINES + OTHER_COPIES
    return Plan(
        teacher.name,
        teacher.parameters,
        profile.name,
        space.size(),
        characters,
        spec.budget_s,
        {k: round(v, 1) for k, v in seconds.items()},
        min(spec.max_candidates, int(seconds["explore"] / per_candidate)),
        min(spec.finalists, finalists),
        int(size * copies + 300e6),
        shutil.disk_usage(_existing(home)).free,
        memory + (layout.workers - 1 if local else 0) * (memory - EMPTY_SEARCH_BYTES + WORKER_BYTES),
        available_memory(),
        tuple(notes),
        spec.most_finalists,
        training_tokens_per_parameter(spec, teacher, profile) if isinstance(teacher, Teacher) else 0.0,
        space.mild,
        layout=layout.describe(),
    )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
