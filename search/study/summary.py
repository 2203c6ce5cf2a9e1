"""How a study stands without its points: a few cheap queries, so that a list of a thousand studies need not read them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from paretune.objectives.metric_names import MetricNames
from paretune.search.study.database import is_taken
from paretune.search.study.records import Event
from paretune.search.study.store import Store, reading
from paretune.search.study.target_records import NAMES
from paretune.search.study.view import DEFAULT_OBJECTIVES, StudyView, doing, front_of, point_of, standing, written_at

META = (
    "state",
    "stage",
    "doing",
    "created",
    "spec",
    "teacher",
    "profile",
    "figures",
    "spent_s",
    "spent_at",
    "budget_s",
    "seconds_by_stage",
    NAMES,
)
FAILURES = ("failed", "infeasible", "lost")
LAST_EVENTS = 5


@dataclass(frozen=True)
class Standing:
    """`told` is JSON-able and has the keys of `summary`; `events` are the last LAST_EVENTS, oldest first."""

    told: dict[str, Any]
    events: tuple[Event, ...]


def load_standing(store: Store) -> Standing:
    """The summary of a study and its last events. Reads the confirmed candidates, of which there are few, and counts the others.

    Rows that cannot be read are told as events. Raises EnvironmentProblem if the study as a whole cannot be read.
    """
    with reading(store):
        return _load_standing(store)


def _load_standing(store: Store) -> Standing:
    bad: list[str] = []
    meta = {**dict.fromkeys(META), **store.metas(META)}
    if meta["state"] == "running" and not is_taken(store.folder):
        meta["state"] = "interrupted"
    objectives = tuple((meta["spec"] or {}).get("objectives") or DEFAULT_OBJECTIVES)
    figures = MetricNames.of(meta["figures"])
    latest = {e.key: e for e in store.evaluations("confirmed", "complete", bad)}
    rows = {row.key: row for row in store.candidates(latest, bad)}
    latest = {key: e for key, e in latest.items() if key in rows}
    front, ties = front_of([point_of(rows[k], e, "confirmed", figures) for k, e in latest.items()], objectives)
    counts = store.counts()
    told = {
        **_described(store.folder.name, meta, meta[NAMES] or [], objectives),
        "spent_s": meta["spent_s"] or 0.0,
        "spent_at": written_at(meta),
        "budget_s": meta["budget_s"],
        "explored": counts.get(("rung0", "complete"), (0, 0))[1],
        "confirmed": len(latest),
        "front": len(front),
        "ties": len(ties),
        "failures": sum(rows for (_, status), (rows, _) in counts.items() if status in FAILURES),
        "seconds_by_stage": meta["seconds_by_stage"] or {},
        "doing": doing(meta),
    }
    return Standing(
        told, tuple([*store.events(LAST_EVENTS), *(Event("", "unreadable", text) for text in bad)][-LAST_EVENTS:])
    )


def summary(view: StudyView) -> dict[str, Any]:
    """The same of a study that has been read as a whole."""
    return {**_described(view.study, view.meta, [t.name for t in view.targets], view.objectives), **standing(view)}


def _described(study: str, meta: dict[str, Any], targets: list[str], objectives: tuple[str, ...]) -> dict[str, Any]:
    return {
        "study": study,
        "state": meta["state"],
        "stage": meta["stage"],
        "created": meta["created"],
        "teacher": (meta["teacher"] or {}).get("name"),
        "profile": (meta["profile"] or {}).get("name"),
        "targets": list(targets),
        "objectives": list(objectives),
    }
