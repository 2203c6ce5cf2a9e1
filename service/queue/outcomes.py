"""What the end of a search's process means for its job: a pure function of what is known of it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from paretune.common.errors import ParetuneError
from paretune.common.files import tells_of_disk
from paretune.search.execution.ending import Told
from paretune.search.study.control import Verb
from paretune.search.study.store import Store, reading
from paretune.service.queue.job import Job, State

FINAL = (0, 2, 3, 4, 5)  # exit codes of a search that the same command would only repeat
INTERRUPTED = (130, -2)  # by SIGINT, -2 before it could catch it
UNSEEN = -1_000_000  # of a search that was not started here
WORDS: dict[State, Verb] = {"pausing": "pause", "stopping": "stop", "cancelling": "cancel"}
RESTED: dict[State, State] = {"pausing": "paused", "stopping": "complete", "cancelling": "cancelled"}
STATES_OF: dict[str, State] = {"complete": "complete", "cancelled": "cancelled", "paused": "paused"}
TOLD_CHARACTERS = 2000


@dataclass(frozen=True)
class Says:
    """What a study's own store says: its state ("" where there is none, "unreadable"), why it ended, what to do, seconds used."""

    state: str = ""
    ended: str = ""
    remedy: str = ""
    spent_s: float = 0.0
    budget_s: float = 0.0


def study_says(folder: Path) -> Says:
    """What the store in `folder` says; raises nothing."""
    if not (folder / "study.db").is_file():
        return Says()
    try:
        with contextlib.closing(Store.reader(folder)) as store, reading(store):
            known = store.metas(("state", "ended", "remedy", "spent_s", "budget_s"))
    except ParetuneError as error:
        return Says("unreadable", error.problem, error.remedy)
    return Says(
        str(known.get("state")),
        str(known.get("ended") or ""),
        str(known.get("remedy") or ""),
        float(known.get("spent_s") or 0.0),
        float(known.get("budget_s") or 0.0),
    )


@dataclass(frozen=True)
class Ended:
    """What is known of the end: exit code, the study, what the process told, the last words of its log, what the disk lacks, and
    whether the service ends, too."""

    code: int
    study: Says = Says()
    told: Told | None = None
    words: str = ""
    lack: str = ""
    service_ends: bool = False


@dataclass(frozen=True)
class Outcome:
    """The job's next state with the reason. `shortage`: what holds the queue; `crashed`: it counts; `order`: a word that the study
    must still be given."""

    state: State
    reason: str = ""
    shortage: str = ""
    crashed: bool = False
    order: Verb | None = None


def outcome_of(job: Job, end: Ended, most_restarts: int) -> Outcome:
    """How a job stands after its process has ended."""
    state, shortage = end.study.state, shortage_of(end)
    if job.state in RESTED and state == STATES_OF.get(RESTED[job.state]):
        return Outcome(RESTED[job.state], _final_reason(end) if end.code in FINAL and end.code else "")
    if shortage and state not in ("complete", "cancelled"):
        return _held(job, shortage)
    if end.code in FINAL:
        return _final(end)
    if job.state in RESTED and end.code in INTERRUPTED:
        return Outcome(RESTED[job.state])
    if end.code in (*INTERRUPTED, UNSEEN) and state in STATES_OF:
        return Outcome(STATES_OF[state])
    if job.state in RESTED:  # it died on the way to where it was asked to go
        word = WORDS[job.state]
        begun = word != "pause" and bool(state)
        return Outcome(RESTED[job.state], "its process had died", order=word if begun else None)
    if end.service_ends:
        return Outcome("queued", "the service ended; the next one goes on")
    if end.code == UNSEEN:
        return Outcome("queued", "its service had ended; it goes on")
    if end.code in INTERRUPTED:
        return Outcome("paused", "interrupted by a signal")
    return _crashed(job, end, most_restarts)


def shortage_of(end: Ended) -> str:
    """What the machine lacked, in words; empty where that is not why it ended."""
    if end.code in (0, 3, UNSEEN):
        return ""
    if end.told is not None:
        return f"{end.told.problem}; {end.told.remedy}" if end.told.passes else ""
    if end.code == 5 and tells_of_disk(end.study.ended):
        return end.study.ended
    return end.lack if end.code not in (2, 4, *INTERRUPTED) else ""


def _held(job: Job, shortage: str) -> Outcome:
    reason, short = f"held: {shortage}"[:TOLD_CHARACTERS], shortage.partition(";")[0]
    if job.state not in RESTED:
        return Outcome("queued", reason, short)
    word = WORDS[job.state]
    return Outcome(RESTED[job.state], reason, short, order=None if word == "pause" else word)


def _final(end: Ended) -> Outcome:
    if end.code in (0, 3):
        return Outcome("complete", "the budget ended before a student was confirmed" if end.code else "")
    if end.code == 4 and end.study.state == "complete":  # stopped before anything was confirmed
        return Outcome("complete", "nothing was confirmed")
    return Outcome("failed", _final_reason(end))


def _final_reason(end: Ended) -> str:
    """The search's own words: what it told, what its study says, the last ones of its log."""
    if end.told is not None:
        found = f"{end.told.problem}; {end.told.remedy}" if end.told.remedy else end.told.problem
    elif end.code == 4 and end.study.ended:
        used = f"{end.study.spent_s:.0f} s of {end.study.budget_s:.0f} s were used" if end.study.budget_s else ""
        found = "; ".join(
            part for part in (f"no candidate was confirmed: {end.study.ended}", used, end.study.remedy) if part
        )
    elif end.study.ended and end.study.state != "running":
        found = f"{end.study.ended}; {end.study.remedy}" if end.study.remedy else end.study.ended
    else:
        found = end.words or f"exit code {end.code}"
    return found[:TOLD_CHARACTERS]


def _crashed(job: Job, end: Ended, most_restarts: int) -> Outcome:
    attempts = job.attempts + 1
    how = f"signal {-end.code}" if end.code < 0 else f"exit code {end.code}"
    if attempts <= most_restarts:
        return Outcome("queued", f"died by {how}; it is started again", crashed=True)
    words = end.told.problem if end.told is not None else end.words
    reason = f"the search died {attempts} times, the last time by {how}: {words}"
    return Outcome("failed", reason[:TOLD_CHARACTERS], crashed=True)
