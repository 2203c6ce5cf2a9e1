"""The queue: which searches the service was asked for and how each stands; one SQLite file, one writer.

What is answered is committed (WAL, synchronous=FULL), so a submit that a client has seen survives any crash, and the same
submit with the same key is the same search however often it is sent.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import sqlalchemy as sa

from paretune.common.errors import UsageError
from paretune.common.files import write_atomically
from paretune.common.text import clean, problem_of, require_text
from paretune.search.budget import TAIL_S
from paretune.search.prepare.studies import STUDY_NAME
from paretune.search.study.control import Verb, WrongState, order, state_of
from paretune.search.study.database import is_taken, open_engine, take_lock
from paretune.search.study.database_errors import told
from paretune.search.study.records import now
from paretune.search.study.store import Store, reading
from paretune.service.queue.checks import check_plan, check_settings, not_from_here
from paretune.service.queue.hold import Condition
from paretune.service.queue.job import ENDED, LIVE, STATES, Conflict, Job, QueueFull, State, Unknown

MOST_WAITING = 1000
CLIENT_KEY = re.compile(r"[\x21-\x7e]{1,200}")
DATABASE = "jobs.db"
WHAT = "the queue's database"
STATES_OF: dict[str, State] = {"complete": "complete", "cancelled": "cancelled", "paused": "paused"}
ASKED: dict[Verb, State] = {"pause": "pausing", "stop": "stopping", "cancel": "cancelling"}

metadata = sa.MetaData()
job_table = sa.Table(
    "job",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("study", sa.Text, nullable=False, unique=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("client_key", sa.Text, unique=True),
    sa.Column("attempts", sa.Integer, nullable=False, default=0),
    sa.Column("created", sa.Text, nullable=False),
    sa.Column("started", sa.Text, nullable=False, default=""),
    sa.Column("ended", sa.Text, nullable=False, default=""),
    sa.Column("reason", sa.Text, nullable=False, default=""),
)


class Queue:
    """The jobs of a home. Thread-safe; only one process at a time has it. Raises EnvironmentProblem if another one does."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "service"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held: IO[str] = take_lock(self.folder)
        self._engine = open_engine(self.folder, "rwc", DATABASE)
        try:
            with told(self.folder, WHAT):
                metadata.create_all(self._engine)
        except BaseException:
            self.close()
            raise
        self._lock = threading.RLock()
        self.changed = threading.Event()
        self.watch: Callable[[], Condition] = lambda: Condition(
            "off", "this service only shows: it was started with --searches 0"
        )

    def close(self) -> None:
        """Close the database and let another process have the queue."""
        self._engine.dispose()
        self._held.close()

    # what clients ask

    def submit(
        self, settings: dict[str, Any], client_key: str | None = None, name: str | None = None
    ) -> tuple[Job, bool]:
        """(the job, whether it is new). The settings are those of a search's file.

        Raises UsageError for settings or a name that a search would refuse, Conflict if the key came with other settings before or
        the name is taken, QueueFull.
        """
        checked = check_settings(settings)
        check_plan(checked, self.home)
        if client_key is not None and not CLIENT_KEY.fullmatch(client_key):
            raise UsageError(
                "a client's key has 1 to 200 printable ASCII characters without spaces", "send another one"
            )
        if name is not None and not STUDY_NAME.fullmatch(name):
            raise UsageError(
                f"a study's name has letters, digits, '.', '_' and '-' only, but got {name!r}", "choose another name"
            )
        with self._writing() as connection:
            known = None if client_key is None else _one(connection, job_table.c.client_key == client_key)
            if known is not None:
                if known.settings != checked or name not in (None, known.study):
                    other = "with other settings" if known.settings != checked else f"not under the name {name!r}"
                    raise Conflict(f"the key was used before, for the study {known.study!r}, {other}", "use a new key")
                return self._placed(connection, known), False
            waiting = connection.execute(
                sa.select(sa.func.count()).select_from(job_table).where(job_table.c.state == "queued")
            ).scalar_one()
            if waiting >= MOST_WAITING:
                raise QueueFull(f"at most {MOST_WAITING} searches wait at a time", "wait until some have run")
            study = self._new_name(connection, checked, name)
            self._write_spec(study, checked)
            row = {"study": study, "state": "queued", "settings": json.dumps(checked), "client_key": client_key}
            connection.execute(sa.insert(job_table).values(**row, created=now(), attempts=0, reason=""))
            made = _one(connection, job_table.c.study == study)
            assert made is not None
            job = self._placed(connection, made)
        self.changed.set()
        return job, True

    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(job_table).order_by(job_table.c.number)).all()
        jobs, position = [], 0
        for row in rows:
            job = _job(row)
            position += job.state == "queued"
            jobs.append(replace(job, position=position) if job.state == "queued" else job)
        return jobs

    def job(self, study: str) -> Job | None:
        """Return the job of a study with its place in the queue; None if there is none."""
        if problem_of(study):
            return None
        with self._reading() as connection:
            found = _one(connection, job_table.c.study == study)
            return None if found is None else self._placed(connection, found)

    def pause(self, study: str) -> Job:
        """Pause a running search, or let a waiting one wait until it is resumed. Raises Unknown, UsageError."""
        return self._ask(study, "pause")

    def stop(self, study: str) -> Job:
        """Let a search finish what it does and end it. Raises Unknown, UsageError."""
        return self._ask(study, "stop")

    def cancel(self, study: str) -> Job:
        """End a search now, or take a waiting one back. Raises Unknown, UsageError."""
        return self._ask(study, "cancel")

    def resume(self, study: str) -> Job:
        """Put a paused, interrupted or failed search into the queue again, also one that a command line began.

        Raises Unknown; WrongState if it runs, has ended or has used its budget; UsageError for one of a plug-in, which is a program.
        """
        folder = self.home / "studies" / study
        job = self.job(study)
        begun = bool(STUDY_NAME.fullmatch(study)) and (folder / "study.db").is_file()
        if job is None and not begun:
            raise Unknown(f"no study is called {study!r}", "look at /v1/studies")
        state = job.state if job is not None else "paused"
        if state in LIVE or is_taken(folder):
            raise WrongState(
                f"only a search that rests can be resumed, but {study} is {state if state in LIVE else 'running'}",
                "wait, or pause it",
            )
        known = self._kept(folder) if begun else {}
        ended = next((s for s in (state, known.get("state")) if s in ("cancelled", "complete")), None)
        if ended is not None:
            raise WrongState(f"a search that has ended is not resumed, but {study} is {ended}", "submit a new one")
        if state == "unreadable":
            raise WrongState(f"the settings of {study} cannot be read", "cancel it, and submit a new one")
        settings = job.settings if job is not None else known.get("spec")
        if problem := not_from_here(study, settings):
            raise problem
        spent, budget = float(known.get("spent_s") or 0.0), float(known.get("budget_s") or 0.0)
        if budget and spent >= budget - TAIL_S:
            raise WrongState(
                f"{study} has used {spent:.0f} s of its budget of {budget:.0f} s",
                "submit a new search with a longer budget",
            )
        if job is None:
            self._adopt(folder, known)
        return self.put(study, "queued", attempts=0, reason="")

    # what the supervisor writes

    def put(self, study: str, state: State, **values: Any) -> Job:
        """Write a job's state and other columns."""
        if state in ENDED:
            values.setdefault("ended", now())
        with self._writing() as connection:
            connection.execute(sa.update(job_table).where(job_table.c.study == study).values(state=state, **values))
            found = _one(connection, job_table.c.study == study)
            assert found is not None
            job = self._placed(connection, found)
        self.changed.set()
        return job

    def next_waiting(self) -> Job | None:
        """The job that waits longest."""
        return next((job for job in self.jobs() if job.state == "queued"), None)

    def refusal(self, job: Job) -> str:
        """Why a job must not be started, whoever has put it into the queue; empty if nothing speaks against it."""
        problem = not_from_here(job.study, job.settings)
        return "" if problem is None else str(problem)

    def spec_file(self, study: str) -> Path:
        """Return the path of the settings with which the study's search is started."""
        return self.folder / "specs" / f"{study}.yaml"

    def _ask(self, study: str, verb: Verb) -> Job:
        folder = self.home / "studies" / study
        with self._lock:
            job, begun = self.job(study), bool(STUDY_NAME.fullmatch(study)) and (folder / "study.db").is_file()
            if job is None and not begun:
                raise Unknown(f"no study is called {study!r}", "look at /v1/studies")
            if begun and (job is None or (job.state not in LIVE and is_taken(folder))):
                return self._ask_other(folder, verb)
            assert job is not None
            if job.state in ENDED:
                raise WrongState(f"only a search that has not ended takes a {verb}, but {study} is {job.state}", "")
            if job.state not in LIVE:
                return self._ask_resting(job, folder, verb)
            if begun and is_taken(folder):
                order(folder, verb)
            return self.put(study, ASKED[verb])  # the supervisor orders it of a search that is only starting

    def _ask_other(self, folder: Path, verb: Verb) -> Job:
        """A study that a command line runs, or began, obeys too; it is no job of this queue."""
        order(folder, verb)
        state = ASKED[verb] if is_taken(folder) else STATES_OF.get(state_of(folder), "paused")
        return Job(folder.name, state, {}, reason="not begun by this service")

    def _ask_resting(self, job: Job, folder: Path, verb: Verb) -> Job:
        if verb == "pause":
            if job.state == "paused":
                return job
            return self.put(job.study, "paused", reason="paused before it began")
        if (folder / "study.db").is_file():
            order(folder, verb)
        begun = (folder / "study.db").is_file()
        return self.put(
            job.study, "complete" if verb == "stop" and begun else "cancelled", reason=f"{verb} while it rested"
        )

    def _kept(self, folder: Path) -> dict[str, Any]:
        """What the study's store says. Raises EnvironmentProblem if it cannot be read."""
        with contextlib.closing(Store.reader(folder)) as store, reading(store):
            return store.metas(("spec", "state", "created", "spent_s", "budget_s"))

    def _adopt(self, folder: Path, known: dict[str, Any]) -> None:
        """A job for a study that a command line began."""
        settings, own = known["spec"], STATES_OF.get(str(known["state"]), "paused")
        with self._writing() as connection:
            if _one(connection, job_table.c.study == folder.name) is None:
                self._write_spec(folder.name, settings)
                row = {
                    "study": folder.name,
                    "state": own,
                    "settings": json.dumps(settings),
                    "created": known["created"],
                }
                connection.execute(sa.insert(job_table).values(**row, reason="begun by a command line"))

    def _write_spec(self, study: str, settings: dict[str, Any]) -> None:
        """JSON is YAML: the file that the search is started with."""
        write_atomically(self.spec_file(study), json.dumps(settings, indent=1).encode())

    def _new_name(self, connection: sa.Connection, settings: dict[str, Any], wanted: str | None) -> str:
        def free(name: str) -> bool:
            used = _one(connection, job_table.c.study == name) is not None
            return not used and not (self.home / "studies" / name).exists()

        if wanted is not None:
            if not free(wanted):
                raise Conflict(f"a study called {wanted!r} exists", "choose another name, or leave it out")
            return wanted
        teacher = Path(str(settings.get("teacher", "study")).rsplit(":", 1)[-1]).name.lower()
        base = f"{re.sub('[^a-z0-9-]+', '-', teacher).strip('-') or 'study'}-{datetime.date.today():%m%d}"
        number = 1 + int(
            connection.execute(
                sa.select(sa.func.count()).select_from(job_table).where(job_table.c.study.startswith(f"{base}-"))
            ).scalar_one()
        )
        while not free(f"{base}-{number}"):
            number += 1
        return f"{base}-{number}"

    def _placed(self, connection: sa.Connection, job: Job) -> Job:
        """With its place in the queue."""
        if job.state != "queued":
            return job
        number = sa.select(job_table.c.number).where(job_table.c.study == job.study).scalar_subquery()
        where = (job_table.c.state == "queued") & (job_table.c.number <= number)
        place = connection.execute(sa.select(sa.func.count()).select_from(job_table).where(where)).scalar_one()
        return replace(job, position=int(place))

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """Raises DiskProblem where the disk takes nothing; nothing is written then."""
        with self._lock, told(self.folder, WHAT), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with told(self.folder, WHAT), self._engine.connect() as connection:
            yield connection


def _one(connection: sa.Connection, where: sa.ColumnElement[bool]) -> Job | None:
    row = connection.execute(sa.select(job_table).where(where)).first()
    return None if row is None else _job(row)


def _job(row: Any, position: int = 0) -> Job:
    """The job of a row; one that cannot be read is a job without settings that says so."""
    study, state = clean(str(row.study)), row.state
    try:
        settings = json.loads(row.settings)
        if not isinstance(settings, dict):
            raise ValueError("the settings are no mapping")
        require_text(settings)
        json.dumps(settings, allow_nan=False)
        if state not in STATES:
            raise ValueError(f"{str(state)[:40]!r} is no state")
        created, started, ended = (str(value or "") for value in (row.created, row.started, row.ended))
        for moment in (created, started, ended):
            datetime.datetime.fromisoformat(moment or now())
        return Job(
            study,
            state,
            settings,
            row.client_key,
            int(row.attempts or 0),
            created,
            started,
            ended,
            clean(str(row.reason or "")),
            position,
        )
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"its row in the queue cannot be read: {clean(str(error))[:300]}; cancel it, and submit it again"
        return Job(study, state if state in ENDED else "unreadable", {}, reason=reason)
