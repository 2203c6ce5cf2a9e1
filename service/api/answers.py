"""What the HTTP interface and the pages tell of studies, as JSON-able data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from paretune.common.errors import UsageError
from paretune.search.recommend.advice import Advice, advise
from paretune.search.recommend.answer import Answer, answer_on
from paretune.search.recommend.compare import compare, comparison_dict
from paretune.search.recommend.recommend import Limits, point_dict
from paretune.search.study.summary import summary
from paretune.search.study.view import Point, StudyView, label_of
from paretune.service.queue.job import LIVE, Job, Unknown, shown_state
from paretune.service.state import Service

Kind = Literal["confirmed", "rung0"]
MOST_COMPARED = 12
MOST_LISTED, LISTED = 1000, 100


@dataclass(frozen=True)
class Listed:
    """A part of the list of studies; `total` counts all that have the text in their name."""

    studies: list[dict[str, Any]]
    total: int
    offset: int


def listed(service: Service, limit: int = MOST_LISTED, offset: int = 0, text: str = "") -> Listed:
    """Studies and searches without one: their summaries, with the state that is shown, and their `job`. What runs or waits for
    its first start comes first, then the one that changed last. Only the stores of this part are opened."""
    jobs = {job.study: job for job in service.queue.jobs()}
    moments = service.studies.moments()
    entries = [((False, moment), name) for moment, name in moments]
    begun = {name for _, name in moments}
    entries += [(_place(job), name) for name, job in jobs.items() if name not in begun]
    wanted = [name for _, name in sorted(entries, reverse=True) if text.lower() in name.lower()]
    return Listed(
        [_entry(service, name, jobs.get(name), name in begun) for name in wanted[offset : offset + limit]],
        len(wanted),
        offset,
    )


def _entry(service: Service, name: str, job: Job | None, begun: bool) -> dict[str, Any]:
    if not begun:
        return {"study": name, "state": shown_state(job, None), "job": job}
    told = service.studies.summary(name)
    return {**told, "state": shown_state(job, told["state"]), "job": job}


def _place(job: Job) -> tuple[bool, float]:
    """Where a search without a study stands in the list: on top while it waits or starts, else at the time when it ended."""
    moment = job.ended or job.created
    return job.state == "queued" or job.state in LIVE, datetime.fromisoformat(moment).timestamp() if moment else 0.0


def front(service: Service, view: StudyView, profile: str | None) -> dict[str, Any]:
    """The front as seen from a profile. Raises UsageError, NothingFeasible."""
    answer = answered(service, view, profile)
    there = answer.view
    return {
        "study": view.study,
        "profile": answer.name,
        "kept": answer.kept,
        "objectives": list(there.objectives),
        "ties": there.ties,
        "front": [point_dict(p) for p in there.front],
    }


def candidate(view: StudyView, key: str) -> dict[str, Any]:
    """One candidate, confirmed if it is, with its place. Raises Unknown."""
    point = find_point(view, key)
    return {
        **point_dict(point),
        "study": view.study,
        "on_front": any(p.key == key for p in view.front),
        "tied_with": view.ties.get(key),
        "facts": _facts(point),
        "labels": {name: label_of(name, view.figures) for name in point.measurements},
        "regret": _regret_row(view, key),
    }


def find_point(view: StudyView, key: str) -> Point:
    """The confirmed point of this key, else the one of rung 0. Raises Unknown."""
    for points in (view.confirmed, view.rung0):
        for point in points:
            if point.key == key:
                return point
    raise Unknown("no candidate of this study has this key", "look at the study's candidates")


def candidates(view: StudyView, kind: Kind, limit: int, offset: int) -> dict[str, Any]:
    """A part of the candidates in the order of their proposal."""
    points = sorted(view.confirmed if kind == "confirmed" else view.rung0, key=lambda p: p.number)
    chosen = points[offset : offset + limit]
    return {"study": view.study, "total": len(points), "offset": offset, "candidates": [point_dict(p) for p in chosen]}


def recommendation(service: Service, view: StudyView, limits: Limits, goal: str | None, profile: str | None) -> Advice:
    """As `paretune recommend`. Raises UsageError, NothingFeasible where nothing is confirmed."""
    return advise(view, limits, goal, known_profile(service, view, profile), service.home)


def targets(view: StudyView) -> dict[str, Any]:
    """All targets of a study with the regret matrices; only itself where it has none."""
    found = compare(view)
    if found is None:
        return {"study": view.study, "cost": view.figures.latency, "targets": [], "regret": []}
    return comparison_dict(found)


def compared(service: Service, names: Sequence[str], keys: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Studies, or candidates of studies, side by side. Raises Unknown, UsageError for more than MOST_COMPARED."""
    if not 1 <= len(names) + len(keys) <= MOST_COMPARED:
        raise UsageError(
            f"1 to {MOST_COMPARED} studies or candidates are compared at a time, but got {len(names) + len(keys)}",
            "name fewer",
        )
    views = [service.studies.view(name) for name in names]
    points = [(service.studies.view(study), key) for study, key in keys]
    return {
        "studies": [{**summary(v), "front_points": [point_dict(p) for p in v.front]} for v in views],
        "candidates": [{"study": v.study, **point_dict(find_point(v, key))} for v, key in points],
    }


def answered(service: Service, view: StudyView, profile: str | None) -> Answer:
    """The study on a profile that the service knows. Raises UsageError, NothingFeasible."""
    return answer_on(view, known_profile(service, view, profile), service.home)


def known_profile(service: Service, view: StudyView, profile: str | None) -> str | None:
    """A profile's name as given; never a path. Raises UsageError."""
    if profile is None:
        return None
    from paretune.service.api.allowed import choices

    own = str((view.meta.get("profile") or {}).get("name", ""))
    known = {own, *(t.name for t in view.targets), *choices(service.home)["profile"]}
    if profile not in known:
        raise UsageError("no profile has this name", "look at /v1/profiles")
    return profile


def _facts(point: Point) -> dict[str, Any]:
    """How it was made, as far as that is a number or a short text."""
    return {name: v for name, v in point.facts.items() if isinstance(v, int | float | str | bool) and len(str(v)) < 300}


def _regret_row(view: StudyView, key: str) -> dict[str, Any] | None:
    """What running this candidate costs on every target, over that target's own choice, at the shown loss limit."""
    found = compare(view)
    if found is None:
        return None
    shown, cells = found.shown, dict[str, dict[str, Any]]()
    for side in found.sides:
        choice, costs = shown.choices[side.name], side.costs
        if key not in costs:
            cells[side.name] = {"regret": None, "provenance": "unknown"}
            continue
        own = costs.get(choice) if choice is not None else None
        infinite = costs[key] == float("inf")
        regret = None if own is None or infinite else costs[key] / own - 1
        cells[side.name] = {"regret": regret, "provenance": side.provenance(key)}
    return {"loss": shown.limit, "targets": cells}
