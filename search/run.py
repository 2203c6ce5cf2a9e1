"""A search from its settings to its end: create or resume the study, run it, say how it ended."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paretune import __version__
from paretune.hardware_profiles import (
    EnvironmentProblem,
    ParetuneError,
    UsageError,
    detect_local,
    fingerprint,
    load_profile,
    package_version,
)
from paretune.hardware_profiles.files import write_atomically
from paretune.hardware_profiles.profile import Profile
from paretune.search.budget import Budget
from paretune.search.director import MAX_ATTEMPTS, Director
from paretune.search.execute import run_ray
from paretune.search.spec import Spec
from paretune.search.store import Store
from paretune.search.table_cost import BUDGET_SHARE, affordable_tokens, expected_seconds
from paretune.spaces.space import Space
from paretune.teachers import EMBEDDED, Teacher, library_corpus, load_teacher, user_corpus
from paretune.teachers.teacher import EMBEDDED_FOLDER
from paretune.teachers.text import SPLITS, library_mismatches

PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-genai",
    "onnx",
    "transformers",
    "optuna",
    "ray",
    "mlflow",
    "numpy",
    "sqlalchemy",
)
STUDY_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")
MIN_BUDGET_S = 45.0
AFFORDABLE = 0.05
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


@dataclass(frozen=True)
class Ready:
    """Everything that was checked before work starts."""

    spec: Spec
    teacher: Teacher
    profile: Profile
    space: Space
    plan: Plan
    text: str = ""

    @property
    def identity(self) -> str:
        """12 hex digits over everything that must not change inside a study: settings, teacher, text, profile, machine, versions."""
        parts = (
            self.spec.digest(),
            self.teacher.digest,
            self.text,
            self.profile.model_dump_json(),
            fingerprint(),
            __version__,
        )
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def prepare(spec: Spec, home: Path) -> Ready:
    """Check teacher, text, profile, budget, disk and memory. Raises UsageError or EnvironmentProblem before any work."""
    _check_home(home)
    teacher = load_teacher(spec.teacher)
    profile = load_profile(spec.profile, home)
    corpus = library_corpus() if spec.data is None else user_corpus(Path(spec.data), spec.field)
    affordable = training_tokens_per_parameter(spec, teacher, profile)
    space = Space.of(
        teacher.shape, profile.weight_formats, mild=affordable < AFFORDABLE, second_order=spec.second_order
    )
    notes = []
    if spec.mixed_precision:
        tokens = affordable_tokens(teacher.shape, len(space.mixed_formats), spec.budget_s, profile.cores)
        space = replace(space, mixed=tokens > 0)
        if not tokens:
            notes.append(
                f"mixed precision is not searched: to measure what each layer loses takes more than {BUDGET_SHARE:.0%} of the "
                "budget. A longer --budget searches it"
            )
    if affordable < AFFORDABLE:
        notes.append(
            f"the budget allows {affordable:.3f} training tokens per parameter; below {AFFORDABLE} only mild cuts are "
            "searched beside precision and masks. A longer --budget searches smaller students"
        )
    if (
        spec.data is None
        and teacher.name == EMBEDDED
        and (differing := library_mismatches(EMBEDDED_FOLDER / "heldout.json"))
    ):
        notes.append(
            f"the library of Python {platform.python_version()} differs from the teacher's in {len(differing)} held-out modules; "
            f"figures carry the text's own fingerprint {corpus.fingerprint()}"
        )
    plan = _plan(
        spec,
        teacher,
        profile,
        space,
        {name: sum(len(d.text) for d in corpus.splits[name]) for name in SPLITS},
        home,
        notes,
    )
    if spec.budget_s < MIN_BUDGET_S * max(1.0, teacher.parameters / 6e6):
        least = MIN_BUDGET_S * max(1.0, teacher.parameters / 6e6)
        raise UsageError(
            f"the budget must be at least {least:.0f} s, because the baselines alone take that long, but got {spec.budget}",
            f"use --budget {least / 60:.0f}m or more",
        )
    if plan.disk_bytes > plan.free_disk_bytes:
        raise EnvironmentProblem(
            f"the search needs about {plan.disk_bytes / 1e9:.1f} GB of disk, but {home} has {plan.free_disk_bytes / 1e9:.1f} GB free",
            "free some, or choose another disk with --home",
        )
    return Ready(spec, teacher, profile, space, plan, corpus.fingerprint())


def create_study(ready: Ready, home: Path, study: str, command: str) -> Store:
    """A new study folder with its settings."""
    folder = home / "studies" / study
    text = "standard library of the running Python" if ready.spec.data is None else ready.spec.data
    if not (folder / "study.db").exists():
        _write_setup(ready, folder)
    store = Store.create(
        folder,
        {
            "state": "new",
            "spec": ready.spec.model_dump(mode="json"),
            "identity": ready.identity,
            "profile": ready.profile.model_dump(mode="json"),
            "seed": ready.spec.seed,
            "teacher": {
                "name": ready.teacher.name,
                "digest": ready.teacher.digest,
                "parameters": ready.teacher.parameters,
            },
            "corpus": {"source": text, "fingerprint": ready.text},
            "budget_s": ready.spec.budget_s,
            "space_size": ready.plan.space_size,
            "machine": {**detect_local().__dict__, "fingerprint": fingerprint()},
            "versions": {
                "paretune": __version__,
                "python": platform.python_version(),
                **{name: package_version(name) for name in PACKAGES},
            },
            "command": command,
            "launches": 0,
            "notes": list(ready.plan.notes),
        },
    )
    return store


def _write_setup(ready: Ready, folder: Path) -> None:
    """What workers read; written before the database, so that a study that exists is complete."""
    setup = {
        "spec": ready.spec.model_dump(mode="json"),
        "profile": ready.profile.model_dump(mode="json"),
        "mild": ready.space.mild,
    }
    try:
        write_atomically(folder / "setup.json", json.dumps(setup, indent=1).encode())
    except OSError as error:
        raise EnvironmentProblem(
            f"the study folder {folder} cannot be written: {error.strerror}",
            "free the disk or choose a folder with --home",
        ) from None


def find_study(home: Path, ready: Ready, wanted: str | None) -> tuple[str, bool]:
    """(study id, whether it exists and can go on). The same search again continues an unfinished study, else a new id is made.

    Raises UsageError if the wanted study has an impossible name, is complete, or is another search (other settings, teacher,
    text, profile or machine).
    """
    folder = home / "studies"
    if wanted is not None:
        if not STUDY_NAME.match(wanted):
            raise UsageError(
                f"a study's name has letters, digits, '.', '_' and '-' only, but got {wanted!r}",
                "choose another --study",
            )
        if not (folder / wanted / "study.db").exists():
            return wanted, False
        identity, state = _identity(folder / wanted)
        if state == "complete":
            raise UsageError(
                f"the study {wanted!r} is complete",
                f"look at it with `paretune report {wanted}`, or use another --study name",
            )
        if identity != ready.identity:
            raise UsageError(
                f"the study {wanted!r} was started with other settings, or the teacher, text, profile or machine has changed since",
                "use what it was started with, or another --study name",
            )
        return wanted, True
    for path in sorted(folder.glob("*/study.db"), key=lambda p: p.stat().st_mtime, reverse=True):
        with contextlib.suppress(ParetuneError):  # a damaged study must not block a new one
            identity, state = _identity(path.parent)
            if identity == ready.identity and state != "complete":
                return path.parent.name, True
    base = f"{re.sub('[^a-z0-9-]+', '-', Path(ready.spec.teacher).name.lower())}-{datetime.date.today():%m%d}"
    number = 1
    while (folder / f"{base}-{number}").exists():
        number += 1
    return f"{base}-{number}", False


def _identity(folder: Path) -> tuple[str | None, str | None]:
    store = Store.reader(folder)
    try:
        return store.meta("identity"), store.meta("state")
    finally:
        store.close()


def run_study(
    store: Store,
    ready: Ready,
    home: Path,
    notify: Callable[[str, dict[str, Any]], None],
    address: str | None = None,
    execute: Callable[..., None] = run_ray,
) -> int:
    """Run a created or reopened study to its end; returns the exit code (0, 3, 4, 130). Starting is recovering."""
    launches = int(store.meta("launches", 0)) + 1
    lost = store.recover(MAX_ATTEMPTS)
    budget = Budget(
        ready.spec.budget_s, float(store.meta("spent_s", 0.0) or 0.0), dict(store.meta("seconds_by_stage", {}))
    )
    store.set_meta(launches=launches, state="running", pid=os.getpid())
    store.event(
        "launch", f"launch {launches}" + (f", {lost} evaluations of a dead process are due again" if lost else "")
    )
    director = Director(store, ready.spec, ready.space, budget, notify)
    try:
        execute(director, store.folder, home, ready.profile.cores, launches, address)
    except BaseException:
        with contextlib.suppress(Exception):  # a full disk must not hide what happened
            store.set_meta(state="interrupted", spent_s=budget.elapsed_s)
        raise
    code = _ending(director, store)
    finished = code in (0, 3)  # everything else can be mended, and the same command goes on
    store.set_meta(
        state="complete" if finished else "interrupted",
        spent_s=budget.elapsed_s,
        exit_code=code,
        ended=director.stop_reason,
    )
    store.event("end", f"{director.stop_reason} (exit code {code})")
    shutil.rmtree(store.folder / "work", ignore_errors=code != 130) if code != 130 else None
    return code


def _ending(director: Director, store: Store) -> int:
    if director.exit_code:
        return director.exit_code
    if not store.evaluations("confirmed", "complete"):
        return 4
    baselines = {row.key for row in store.candidates() if row.source == "baseline"}
    return 0 if any(e.key not in baselines for e in store.evaluations("confirmed", "complete")) else 3


def training_tokens_per_parameter(spec: Spec, teacher: Teacher, profile: Profile) -> float:
    """What the elastic student's share of the budget can train, by the speed seen on two cores (3,500 tokens/s at 5.8M)."""
    speed = 3500 * (5.77e6 / teacher.parameters) * profile.cores / 2
    return spec.budget_s * spec.shares.elastic * speed / teacher.parameters


def _plan(
    spec: Spec,
    teacher: Teacher,
    profile: Profile,
    space: Space,
    characters: dict[str, int],
    home: Path,
    notes: list[str],
) -> Plan:
    """Rough costs, scaled from the embedded teacher on two cores."""
    scale = max(0.1, teacher.parameters / 5.77e6) * 2 / max(1, profile.cores)
    seconds = {
        "baselines": 3 * (4 + 4 * scale * spec.report_tokens / 40_000),
        "latency fit": spec.fit_points * (0.7 + 0.4 * scale),
        "elastic student": spec.budget_s * spec.shares.elastic,
    }
    if space.has_mixed:
        formats = len(space.mixed_formats)
        tokens = affordable_tokens(teacher.shape, formats, spec.budget_s, profile.cores)
        seconds["sensitivity"] = expected_seconds(teacher.shape, formats, tokens, profile.cores)
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
    )


def _check_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
        probe = home / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise EnvironmentProblem(
            f"the home folder {home} cannot be written: {error.strerror}",
            "choose a writable folder with --home or PARETUNE_HOME",
        ) from None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize
