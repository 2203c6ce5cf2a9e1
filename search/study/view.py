"""A study as everybody but the search sees it: read from the store, computed anew each time, never written back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from paretune.objectives.directions import minimized
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import DECODER, MetricNames
from paretune.objectives.quality.quality import Scores, paired_difference
from paretune.search.front import Vector, non_dominated
from paretune.search.study.database import is_taken
from paretune.search.study.records import CandidateRow, Evaluation, Event
from paretune.search.study.store import Store, reading
from paretune.search.study.target_records import Target, load_targets
from paretune.spaces.candidate import ALGORITHM_NAMES, Format
from paretune.spaces.kinds import AnyCandidate
from paretune.spaces.module_candidate import ModuleCandidate

LABELS = {
    "nll": "NLL (nats/token)",
    "estimated_nll": "estimated NLL (nats/token)",
    "decode_ms_per_token": "decode (ms/token)",
    "ttft_ms": "TTFT, 128 tokens (ms)",
    "throughput_tokens_per_s": "throughput, one stream (tokens/s)",
    "energy_j_per_token": "energy (J/token)",
    "usd_per_million_tokens": "cost, one stream (USD/million tokens)",
    "compressed_bytes": "compressed artifact (bytes)",
    "bytes": "artifact (bytes)",
    "peak_memory_bytes": "peak memory (bytes)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "kl": "KL to the teacher (nats/token)",
    "top1_agreement": "top-1 agreement",
    "relative_loss": "NLL increase (fraction)",
    "load_ms": "load (ms)",
}
MOST_TOLD = 20  # rows that cannot be read
DEFAULT_OBJECTIVES = ("nll", "decode_ms_per_token", "compressed_bytes")


def label_of(name: str, figures: MetricNames) -> str:
    """What people read for a measurement's name."""
    return dict(figures.labels).get(name) or LABELS.get(name, name)


@dataclass(frozen=True)
class Point:
    """One candidate at one fidelity. Rung-0 points are estimates (hollow in charts); confirmed ones are measured."""

    key: str
    number: int
    source: str
    candidate: AnyCandidate
    kind: Literal["rung0", "confirmed"]
    measurements: dict[str, Measurement]
    facts: dict[str, Any]
    scores: Scores | None
    figures: MetricNames = DECODER

    @property
    def description(self) -> str:
        """One line for people about the candidate's sizes, pattern and formats."""
        return self.candidate.describe()

    @property
    def name(self) -> str:
        """A short label: `teacher int8`, or the size and the precisions."""
        if isinstance(self.candidate, ModuleCandidate):
            form = self.candidate.groups[0].format.name
            return f"teacher {form}" if self.source == "baseline" else self.candidate.name
        x = self.candidate.layers[0]
        if self.source == "baseline":
            return f"teacher {self.candidate.head_format.name}"
        sparse = "" if x.pattern.kind == "none" else f" {x.pattern.name}"
        layers = self.candidate.layers
        attention, ffn = _names([y.attention_format for y in layers]), _names([y.ffn_format for y in layers])
        found_by = ALGORITHM_NAMES[self.candidate.quantizer]
        formats = f"{attention}/{ffn}{f' {found_by}' if found_by else ''}"
        hidden = f" H{self.candidate.hidden}" if self.candidate.hidden else ""
        return f"L{len(self.candidate.layers)}{hidden} F{x.ffn} G{x.kv_groups} {formats}{sparse}"

    def value(self, objective: str) -> Measurement:
        """The measurement of an objective. A rung-0 point answers its quality with an estimate, a confirmed one with the
        interval of its paired difference to the teacher: how hard the text is says nothing about which of two models is better."""
        quality = self.figures.quality
        if objective == quality and self.kind == "rung0":
            return self.measurements[self.figures.estimate]
        found = self.measurements[objective]
        increase = self.measurements.get(self.figures.increase)
        if objective != quality or increase is None:
            return found
        shift = found.value - increase.value
        return replace(
            found, low=increase.low + shift, high=increase.high + shift, note="interval paired with the teacher"
        )

    def vector(self, objectives: Sequence[str]) -> Vector:
        """The objectives as the search minimizes them (directions.py)."""
        return tuple(minimized(name, self.value(name).value) for name in objectives)


@dataclass(frozen=True)
class StudyView:
    """Everything that status, front, recommendation, report and MLflow show."""

    study: str
    folder: Path
    meta: dict[str, Any]
    objectives: tuple[str, ...]
    rung0: tuple[Point, ...]
    confirmed: tuple[Point, ...]
    front: tuple[Point, ...]
    ties: dict[str, str]
    failures: tuple[Evaluation, ...]
    events: tuple[Event, ...]
    seconds_by_stage: dict[str, float]
    figures: MetricNames = DECODER
    targets: tuple[Target, ...] = ()

    @property
    def baselines(self) -> tuple[Point, ...]:
        """The confirmed baselines: the unmodified teacher in several precisions."""
        return tuple(p for p in self.confirmed if p.source == "baseline")

    @property
    def teacher(self) -> Point | None:
        """The teacher at fp32, confirmed."""
        return next((p for p in self.baselines if not p.candidate.is_quantized), None)

    def point(self, key_prefix: str) -> Point | None:
        """The confirmed point whose key starts with `key_prefix`."""
        return next((p for p in self.confirmed if p.key.startswith(key_prefix)), None)


META = (
    "study",
    "created",
    "state",
    "spec",
    "profile",
    "teacher",
    "corpus",
    "versions",
    "machine",
    "spent_s",
    "spent_at",
    "budget_s",
    "fit_error",
    "calibration",
    "recovery_tokens",
    "space_size",
    "elastic",
    "launches",
    "stage",
    "doing",
    "ended",
    "remedy",
    "seed",
    "command",
    "figures",
)


def load_view(store: Store) -> StudyView:
    """Read the whole study. A row that cannot be read is left out and told as an event.

    Raises EnvironmentProblem if the study as a whole cannot be read.
    """
    with reading(store):
        return _load_view(store)


def _load_view(store: Store) -> StudyView:
    bad: list[str] = []
    rows = {row.key: row for row in store.candidates(bad=bad)}
    evaluations = [e for e in store.evaluations(bad=bad) if e.key in rows]
    complete = {(e.key, e.fidelity): e for e in evaluations if e.status == "complete"}.values()
    meta = {name: store.meta(name) for name in META}
    if meta["state"] == "running" and not is_taken(store.folder):
        meta["state"] = "interrupted"  # killed, so that nobody could write it down
    objectives = tuple((meta["spec"] or {}).get("objectives") or DEFAULT_OBJECTIVES)
    figures = MetricNames.of(meta["figures"])
    confirmed = tuple(point_of(rows[e.key], e, "confirmed", figures) for e in complete if e.fidelity == "confirmed")
    rung0 = tuple(point_of(rows[e.key], e, "rung0", figures) for e in complete if e.fidelity == "rung0")
    front, ties = front_of(confirmed, objectives)
    failures = tuple(e for e in evaluations if e.status in ("failed", "infeasible", "lost"))
    return StudyView(
        store.folder.name,  # of a copy under another name, too
        store.folder,
        meta,
        objectives,
        rung0,
        confirmed,
        front,
        ties,
        failures,
        (*store.events(), *(Event("", "unreadable", text, {}) for text in bad[:MOST_TOLD])),
        store.meta("seconds_by_stage", {}),
        figures,
        load_targets(store),
    )


def front_of(points: Sequence[Point], objectives: Sequence[str]) -> tuple[tuple[Point, ...], dict[str, str]]:
    """The non-dominated confirmed points, best quality first, and which of them are ties.

    Two points whose paired intervals overlap in every objective count as one: `ties` maps the later key to the earlier one.
    A point with a disturbed latency is left out, because its place is not known.
    """
    usable = [p for p in points if all(p.value(name).provenance != "disturbed" for name in objectives)]
    chosen = [usable[i] for i in non_dominated([p.vector(objectives) for p in usable])]
    chosen.sort(key=lambda p: (p.value(p.figures.quality).value, p.vector(objectives)))
    ties: dict[str, str] = {}
    quick_first = sorted(
        objectives, key=lambda name: any(name == p.figures.quality for p in chosen)
    )  # the quality resamples
    for i, point in enumerate(chosen):
        for earlier in chosen[:i]:
            if earlier.key not in ties and all(tied(point, earlier, name) for name in quick_first):
                ties[point.key] = earlier.key
                break
    return tuple(chosen), ties


def tied(a: Point, b: Point, objective: str) -> bool:
    """Whether the difference of two points in an objective is within its interval (paired by document for the NLL).

    Two predictions for a target share its priors: they are a tie only if low, likely and high priors do not agree on the order.
    """
    if objective == a.figures.quality and a.scores is not None and b.scores is not None:
        _, low, high = paired_difference(a.scores, b.scores)
        return low <= 0.0 <= high
    one, other = a.value(objective), b.value(objective)
    if one.provenance == other.provenance == "predicted":
        differences = (one.low - other.low, one.value - other.value, one.high - other.high)
        return not (min(differences) > 0 or max(differences) < 0)
    return one.overlaps(other)


def standing(view: StudyView) -> dict[str, Any]:
    """How far a study is: budget used (`spent_s`, as it was at `spent_at`), and how many points of each kind."""
    return {
        "spent_s": view.meta["spent_s"] or 0.0,
        "spent_at": written_at(view.meta),
        "budget_s": view.meta["budget_s"],
        "explored": len(view.rung0),
        "confirmed": len(view.confirmed),
        "front": len(view.front),
        "ties": len(view.ties),
        "failures": len(view.failures),
        "seconds_by_stage": view.seconds_by_stage,
        "doing": doing(view.meta),
    }


def doing(meta: Mapping[str, Any]) -> list[dict[str, str]]:
    """What each of several workers of a running study does: stage, and the candidate in words. Empty with one worker."""
    return list(meta["doing"] or []) if meta["state"] == "running" else []


def written_at(meta: Mapping[str, Any]) -> str | None:
    """When `spent_s` was written; None where a version that does not say so has written it since."""
    spent, at = meta["spent_at"] or (None, None)
    return at if spent == meta["spent_s"] else None


def failure_counts(view: StudyView) -> Counter[str]:
    """Reasons of failed, infeasible and lost evaluations with their number."""
    return Counter(
        f"{e.fidelity} {e.status}: {e.reason.splitlines()[0][:160] if e.reason else 'no reason'}" for e in view.failures
    )


def _names(formats: Sequence[Format]) -> str:
    """`int4`, or `int4+int8` where layers differ."""
    return "+".join(dict.fromkeys(f.name for f in sorted(formats, key=lambda f: f.bits)))


def point_of(
    row: CandidateRow, evaluation: Evaluation, kind: Literal["rung0", "confirmed"], figures: MetricNames
) -> Point:
    """A candidate with what an evaluation of it found."""
    return Point(
        row.key,
        row.number,
        row.source,
        row.candidate,
        kind,
        evaluation.measurements,
        evaluation.facts,
        evaluation.scores,
        figures,
    )
