"""Four words to a search that runs elsewhere: pause, resume, stop, cancel, given through a file in the study's folder.

    pause    nothing new is handed out; what runs is finished, but for work that is done in slices and goes on from the last
             one (the elastic student, the latency fit); then the process ends. The budget does not run meanwhile.
    resume   the same search goes on from its stored settings
    stop     as pause, but for good: report, further targets and notification are made, the study is complete
    cancel   what runs is ended now and forgotten; what was confirmed stays usable; the study is never resumed

The search reads the file between two tasks and while they run, so no process needs to be found or signalled.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Literal, get_args

from paretune.common.command_line import pasted
from paretune.common.errors import UsageError
from paretune.common.files import read_kept, write_atomically
from paretune.search.study.database import is_taken, require_study
from paretune.search.study.database_errors import told
from paretune.search.study.records import now
from paretune.search.study.store import Store, reading

Verb = Literal["pause", "stop", "cancel"]
VERBS: tuple[Verb, ...] = get_args(Verb)
FILE = "control.json"
ENDED = ("complete", "cancelled")
STATE_AFTER: dict[Verb, str] = {"pause": "paused", "stop": "complete", "cancel": "cancelled"}
REASON: dict[Verb, str] = {"pause": "paused", "stop": "stopped", "cancel": "cancelled"}
TOLD: dict[Verb, str] = {
    "pause": "what runs is finished, then the search ends; `{resume}` goes on",
    "stop": "what runs is finished, then the study is complete",
    "cancel": "what runs is ended now; what was confirmed stays usable",
}


class WrongState(UsageError):
    """The study's state does not allow what is asked; nothing is wrong with the request itself."""


def _resume(folder: Path) -> str:
    return pasted("resume", folder.name, home=folder.parent.parent)


def order(folder: Path, verb: Verb) -> str:
    """Give the word to the study in `folder`; returns in a sentence what will happen.

    A study on which nothing runs is stopped or cancelled at once. Raises UsageError if there is none, if it has ended, or if
    it is to be paused and does not run.
    """
    require_study(folder)
    if is_taken(folder):
        with told(folder, "the study"):
            write_atomically(folder / FILE, json.dumps({"verb": verb, "at": now()}).encode())
        return f"{folder.name}: {TOLD[verb].format(resume=_resume(folder))}"
    state = state_of(folder)
    if state in ENDED:
        raise WrongState(
            f"only a study that has not ended takes a {verb}, but {folder.name} is {state}", "choose another"
        )
    if verb == "pause":
        raise WrongState(
            f"only a running search can be paused, but nothing runs on {folder.name} ({state})",
            f"go on with `{_resume(folder)}`, or end it with stop or cancel",
        )
    with contextlib.closing(Store.open_study(folder)) as store, told(folder, "the study database"):
        store.set_meta(state=STATE_AFTER[verb], ended=REASON[verb])
        store.event("end", f"{REASON[verb]} while nothing ran")
    withdraw(folder)
    return f"{folder.name} is {STATE_AFTER[verb]}"


def ordered(folder: Path) -> Verb | None:
    """The word that the study in `folder` was given and has not followed yet; a damaged file is none."""
    found = read_kept(folder / FILE)
    verb = found.get("verb") if isinstance(found, dict) else None
    return verb if verb in VERBS else None


def withdraw(folder: Path) -> None:
    """Forget the word: the search starts, or has followed it."""
    (folder / FILE).unlink(missing_ok=True)


def state_of(folder: Path) -> str:
    """The state that a study's store says: new, running, paused, interrupted, complete, cancelled."""
    with contextlib.closing(Store.reader(folder)) as store, reading(store):
        return str(store.meta("state"))
