"""A study as it looks from a further target: quality and bytes as they are, every cost that target's own."""

from __future__ import annotations

from dataclasses import replace

from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import MetricNames
from paretune.search.study.target_records import Target
from paretune.search.study.view import Point, StudyView, front_of

# What does not depend on the machine; every other measurement of a confirmed candidate is a cost.
INTRINSIC = (
    "nll",
    "nll_increase",
    "relative_loss",
    "perplexity",
    "bits_per_byte",
    "kl",
    "top1_agreement",
    "bytes",
    "compressed_bytes",
)


def needed(view: StudyView) -> set[str]:
    """The costs without which a candidate has no place on a target: the study's latency, memory, and all cost objectives."""
    fixed = set(INTRINSIC) | {view.figures.quality}
    return {view.figures.latency, "peak_memory_bytes", *view.objectives} - fixed


def view_on(view: StudyView, target: Target) -> StudyView:
    """The study on `target`: confirmed points with its costs, its own front and ties; no rung-0 points.

    Left out are candidates that cannot run there and those whose costs are not known. Limits of the spec on times hold for
    the machine that was searched, not here; those on bytes stay.
    """
    wanted = needed(view)
    points = tuple(
        replace(p, measurements=_intrinsic(p, view.figures) | target.rows[p.key].measurements)
        for p in view.confirmed
        if p.key in target.rows
        and not target.rows[p.key].infeasible
        and wanted <= target.rows[p.key].measurements.keys()
    )
    front, ties = front_of(points, view.objectives)
    spec = dict(view.meta.get("spec") or {})
    limits = {name: bound for name, bound in (spec.get("limits") or {}).items() if name in INTRINSIC}
    meta = {**view.meta, "profile": target.profile, "spec": {**spec, "limits": limits}}
    return replace(view, meta=meta, rung0=(), confirmed=points, front=front, ties=ties)


def _intrinsic(point: Point, figures: MetricNames) -> dict[str, Measurement]:
    """Quality and bytes of a point."""
    names = {*INTRINSIC, figures.quality, figures.increase, *figures.others}
    return {name: m for name, m in point.measurements.items() if name in names}
