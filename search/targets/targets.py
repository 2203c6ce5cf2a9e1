"""Further targets of a study: quality is taken once, and each target adds what every confirmed candidate costs there.

A target at hand is measured where it matters, on the members of any target's front, as long as there is time; everything
else is predicted. Doing it again measures what was not measured before and predicts the rest anew: rows are a function of
the study, the profile and the kept measurements.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paretune.common.errors import EnvironmentProblem, Infeasible, UsageError
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.latency.workload import STANDARD, Workload, workload_within
from paretune.search.study.store import Store
from paretune.search.study.target_records import Target, TargetRow, keep_targets, load_targets
from paretune.search.study.target_view import needed, view_on
from paretune.search.study.view import Point, StudyView, load_view
from paretune.search.targets.benchmark import Measurer, TargetBenchmark
from paretune.search.targets.profiles import Predict, can_measure, is_at_hand, missing_engine, roofline, shape_of
from paretune.search.targets.rows import combined
from paretune.spaces.candidate import Candidate, Shape
from paretune.teachers.checkpoint.teacher import load_teacher

MOST_DISTURBED = 2
# Of the first visit, which also opens the latency benchmark and may learn the reference; later ones take as long as was seen.
FIRST_VISIT_S = 15.0
OpenMeasurer = Callable[[Profile], Measurer]


@dataclass
class _Job:
    """One target while its rows come together."""

    profile: Profile
    predicted: dict[str, TargetRow]
    measured: dict[str, TargetRow]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def target(self) -> Target:
        rows = combined(self.predicted, self.measured)
        return Target(
            self.profile.name,
            self.profile.model_dump(mode="json"),
            rows,
            tuple(self.notes),
            self.seconds,
            machine=fingerprint(),
        )


def add_targets(
    store: Store,
    home: Path,
    profiles: Sequence[Profile],
    seconds: float,
    predict: Predict | None = None,
    open_measurer: OpenMeasurer | None = None,
) -> tuple[Target, ...]:
    """Price every confirmed candidate on `profiles` and keep that in the study; measuring ends after about `seconds`.

    Returns the targets in the order of `profiles`. Raises UsageError for a study of a plug-in or without its teacher, or
    what a prediction lacks in a profile that is not at hand.
    """
    deadline, view = time.monotonic() + seconds, load_view(store)
    shape, predict = shape_of(view.meta), predict or roofline(_turn(view))
    kept = {t.name: t for t in load_targets(store)}
    jobs = [_predicted(view, profile, shape, predict, kept.get(profile.name)) for profile in profiles]
    keep_targets(store, [job.target() for job in jobs])
    for job in jobs:
        if can_measure(job.profile):
            opened = (open_measurer or _lane(view, home))(job.profile)
            _measure(store, job, opened, deadline)
        elif is_at_hand(job.profile):
            job.notes.append(f"not measured: the engine {missing_engine(job.profile)} is not installed here")
    found = tuple(job.target() for job in jobs)
    keep_targets(store, found)
    for target in found:
        store.event("target", _told(target, len(view.confirmed)))
    return found


def predict_target(view: StudyView, profile: Profile, predict: Predict | None = None) -> Target:
    """A target that the study does not have, predicted on the fly; nothing is kept. Raises UsageError as `add_targets` does."""
    return _predicted(view, profile, shape_of(view.meta), predict or roofline(_turn(view)), None).target()


def _turn(view: StudyView) -> Workload:
    """What the study's candidates were timed with; studies before contexts were kept have the usual one."""
    context = (view.meta.get("teacher") or {}).get("context")
    return STANDARD if context is None else workload_within(int(context))


def _predicted(view: StudyView, profile: Profile, shape: Shape, predict: Predict, kept: Target | None) -> _Job:
    """A job with predictions, and with what was measured before on this machine under the same profile."""
    start, job = time.monotonic(), _Job(profile, {}, {})
    if kept is not None and kept.profile == profile.model_dump(mode="json") and kept.machine == fingerprint():
        job.seconds = kept.seconds
        job.measured = {key: _measured_part(row) for key, row in kept.rows.items() if row.is_measured}
    for point in view.confirmed:
        assert isinstance(point.candidate, Candidate)
        try:
            job.predicted[point.key] = TargetRow(dict(predict(profile, point.candidate, shape)))
        except Infeasible as error:
            job.predicted[point.key] = TargetRow(infeasible=str(error))
        except UsageError as error:
            if not is_at_hand(profile):
                raise
            job.notes.append(f"not predicted: {error.problem}")
            break
    job.seconds += time.monotonic() - start
    return job


def _measured_part(row: TargetRow) -> TargetRow:
    return TargetRow({name: m for name, m in row.measurements.items() if m.provenance == "measured"})


def _lane(view: StudyView, home: Path) -> OpenMeasurer:
    teacher = load_teacher(str(view.meta["spec"]["teacher"]))
    return lambda profile: TargetBenchmark(view.folder, home, profile, teacher)


def _measure(store: Store, job: _Job, benchmark: Measurer, deadline: float) -> None:
    """Measure what is on a front and not measured yet, this target's own first, and note what was left and why."""
    view = load_view(store)
    for point in view.confirmed:
        row = None if _is_settled(job, point.key) else benchmark.kept(point.candidate)
        predicted = job.predicted.get(point.key, TargetRow()).measurements
        if (
            row is not None and needed(view) <= row.measurements.keys() | predicted.keys()
        ):  # else only a visit tells the rest
            job.measured[point.key] = row
    try:
        disturbed = _visits(store, view, job, benchmark, deadline)
    except (EnvironmentProblem, UsageError) as error:
        job.notes.append(f"not measured further: {error.problem}")
        return
    if disturbed:
        job.notes.append(f"{disturbed} visits were disturbed by other work; these candidates are left predicted")
    elif left := sum(not _is_settled(job, key) for key in dict.fromkeys(_wanted(view, job))):
        job.notes.append(f"{left} members of fronts are left predicted for want of time")


def _visits(store: Store, view: StudyView, job: _Job, benchmark: Measurer, deadline: float) -> int:
    """Visit while another visit fits before the deadline; every row is kept at once. Returns how many were disturbed."""
    points = {p.key: p for p in view.confirmed}
    tried, refused = set[str](), set[str]()
    disturbed, longest = 0, FIRST_VISIT_S
    while time.monotonic() + longest < deadline and disturbed < MOST_DISTURBED:
        key = next((k for k in _wanted(view, job) if k not in tried and not _is_settled(job, k)), None)
        if key is None:
            break
        tried.add(key)
        start = time.monotonic()
        try:
            row = _visit(store, benchmark, points[key])
        except (
            UsageError
        ) as error:  # this one's artifact is missing or damaged; if it is more than that, the next one says the same
            if error.problem in refused:
                raise
            refused.add(error.problem)
            job.notes.append(f"{points[key].name} is left predicted: {error.problem}")
            continue
        seconds = time.monotonic() - start
        job.seconds += seconds
        longest = seconds if len(tried) == 1 else max(longest, seconds)
        disturbed += row is None
        if row is not None:
            job.measured[key] = row
            keep_targets(store, [job.target()])
    return disturbed


def _visit(store: Store, benchmark: Measurer, point: Point) -> TargetRow | None:
    artifact = store.artifact(point.key)
    if artifact is None:
        raise UsageError(f"{point.name} has no artifact", "")
    try:
        return benchmark.measure(point.candidate, artifact)
    except Infeasible as error:
        return TargetRow(infeasible=str(error))


def _is_settled(job: _Job, key: str) -> bool:
    """Nothing is left to find out: it was measured, or cannot run there."""
    return key in job.measured or bool(key in job.predicted and job.predicted[key].infeasible)


def _wanted(view: StudyView, job: _Job) -> Iterator[str]:
    """Keys on the front of this target as it is known now, then on those of the other targets."""
    yield from (p.key for p in view_on(view, job.target()).front)
    yield from (p.key for p in view.front)
    for target in view.targets:
        if target.name != job.profile.name:
            yield from (p.key for p in view_on(view, target).front)


def _told(target: Target, confirmed: int) -> str:
    counts = f"{target.measured} of {confirmed} candidates measured, {len(target.infeasible)} cannot run there"
    return f"target {target.name}: {counts}" + "".join(f"; {note}" for note in target.notes)
