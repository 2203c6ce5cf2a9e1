"""The truth of a study: one SQLite file, one writer. Optuna, Ray Tune, MLflow and the report are views of it.

Starting is recovering: whatever was running when the process died is marked lost and becomes due again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import sqlalchemy as sa

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.file_access import require_readable, unwritable
from paretune.common.files import disk_problem
from paretune.common.text import clean, loads
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores
from paretune.search.study.database import create_database, open_engine, require_study, take_lock
from paretune.search.study.database_errors import database_problem, told
from paretune.search.study.records import CandidateRow, Evaluation, Event, Fidelity, Status, evaluation_of, now
from paretune.search.study.schema import (
    SCHEMA_VERSION,
    artifact_table,
    candidate_table,
    evaluation_table,
    event_table,
    meta_table,
    metadata,
    outbox_table,
)
from paretune.spaces.kinds import AnyCandidate, candidate_from_json

# What a row raises that something else has written.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
Row = TypeVar("Row")


class Store:
    """Rows of one study folder. Open with `create` or `open_study`; `reader` never writes and never blocks the writer."""

    def __init__(self, folder: Path, engine: sa.Engine, lock: IO[str] | None) -> None:
        self.folder, self._engine, self._lock = folder, engine, lock

    @classmethod
    def create(cls, folder: Path, meta: Mapping[str, Any]) -> Store:
        """A new study with its settings. Raises UsageError if it exists, EnvironmentProblem if the folder cannot be written."""
        if (folder / "study.db").exists():
            raise UsageError(f"a study called {folder.name!r} exists", "choose another --study name")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder)
        except OSError as error:
            raise disk_problem(error) or unwritable(
                folder, error, "free the disk or choose a folder with --home", "the study folder"
            ) from None

        def fill(engine: sa.Engine) -> None:
            cls(folder, engine, None).set_meta(schema=SCHEMA_VERSION, created=now(), study=folder.name, **meta)

        try:
            create_database(folder, metadata, fill)
        except sa.exc.OperationalError as error:
            raise database_problem(error, folder, "the study database") from None
        return cls(folder, open_engine(folder, "rw"), lock)

    @classmethod
    def open_study(cls, folder: Path) -> Store:
        """Open for writing; raises UsageError if there is no study, EnvironmentProblem if another search runs on it."""
        require_study(folder)
        require_readable(folder / "study.db")
        return _checked(cls(folder, open_engine(folder, "rw"), take_lock(folder)))

    @classmethod
    def reader(cls, folder: Path) -> Store:
        """Open read-only, also while a search runs."""
        require_study(folder)
        require_readable(folder / "study.db")
        return _checked(cls(folder, open_engine(folder, "ro"), None))

    def close(self) -> None:
        """Close the database and let another process write to the study."""
        self._engine.dispose()
        if self._lock is not None:
            self._lock.close()

    @property
    def is_there(self) -> bool:
        """Whether the study is still on the disk."""
        return (self.folder / "study.db").is_file()

    def meta(self, name: str, default: Any = None) -> Any:
        """Return the value of one of the study's settings, `default` if it is not set."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(meta_table.c.value).where(meta_table.c.name == name)).first()
        return default if row is None else loads(row[0])

    def metas(self, names: Collection[str]) -> dict[str, Any]:
        """The values of those of `names` that are set, in one query."""
        query = sa.select(meta_table).where(meta_table.c.name.in_(names))
        with self._engine.connect() as connection:
            return {row.name: loads(row.value) for row in connection.execute(query)}

    def set_meta(self, **values: Any) -> None:
        """Write or replace settings of the study in one transaction. Values must be JSON-able."""
        rows = [{"name": name, "value": json.dumps(value)} for name, value in values.items()]
        with self._engine.begin() as connection:
            connection.execute(sa.insert(meta_table).prefix_with("OR REPLACE"), rows)

    def add_candidate(self, candidate: AnyCandidate, source: str, params: Mapping[str, Any], **meta: Any) -> bool:
        """Record a proposal, with `meta` in the same transaction; False if this candidate is known."""
        with self._engine.begin() as connection:
            if connection.execute(
                sa.select(candidate_table.c.key).where(candidate_table.c.key == candidate.key)
            ).first():
                return False
            for name, value in meta.items():
                row = {"name": name, "value": json.dumps(value)}
                connection.execute(sa.insert(meta_table).prefix_with("OR REPLACE").values(**row))
            number = connection.execute(
                sa.select(sa.func.coalesce(sa.func.max(candidate_table.c.number), -1) + 1)
            ).scalar_one()
            connection.execute(
                sa.insert(candidate_table).values(
                    key=candidate.key,
                    number=number,
                    source=source,
                    candidate=candidate.to_json(),
                    params=json.dumps(dict(params)),
                    created=now(),
                )
            )
        return True

    def candidates(self, keys: Collection[str] | None = None, bad: list[str] | None = None) -> list[CandidateRow]:
        """All candidates in the order of their proposal, or those of `keys` only. Rows that cannot be read are left out and told in
        `bad`; without it they raise."""
        query = sa.select(candidate_table).order_by(candidate_table.c.number)
        if keys is not None:
            query = query.where(candidate_table.c.key.in_(keys))
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return _each(
            rows,
            lambda r: CandidateRow(r.key, r.number, r.source, candidate_from_json(r.candidate), loads(r.params)),
            "candidate",
            bad,
        )

    def start(self, key: str, fidelity: Fidelity) -> int:
        """A candidate is being evaluated: returns which attempt this is, from 1."""
        with self._engine.begin() as connection:
            where = (evaluation_table.c.key == key) & (evaluation_table.c.fidelity == fidelity)
            attempt = int(connection.execute(sa.select(sa.func.count()).where(where)).scalar_one()) + 1
            connection.execute(
                sa.insert(evaluation_table).values(
                    key=key, fidelity=fidelity, status="running", attempt=attempt, at=now()
                )
            )
        return attempt

    def finish(
        self,
        key: str,
        fidelity: Fidelity,
        status: Status,
        *,
        measurements: Mapping[str, Measurement] | None = None,
        scores: Scores | None = None,
        facts: Mapping[str, Any] | None = None,
        reason: str = "",
        seconds: float = 0.0,
        publish: bool = False,
        artifact: tuple[Path, str] | None = None,
    ) -> bool:
        """End the running evaluation in one transaction, with its artifact and outbox row.

        False if it is not running any more (a late result), which changes nothing.
        """
        where = (
            (evaluation_table.c.key == key)
            & (evaluation_table.c.fidelity == fidelity)
            & (evaluation_table.c.status == "running")
        )
        values = {
            "status": status,
            "measurements": json.dumps({n: m.to_dict() for n, m in (measurements or {}).items()}),
            "scores": json.dumps(None if scores is None else scores.__dict__),
            "facts": json.dumps(dict(facts or {})),
            "reason": clean(reason),
            "seconds": seconds,
            "at": now(),
        }
        with self._engine.begin() as connection:
            if connection.execute(sa.update(evaluation_table).where(where).values(**values)).rowcount == 0:
                return False
            if artifact is not None:
                row = {"key": key, "path": artifact[0].relative_to(self.folder).as_posix(), "sha256": artifact[1]}
                connection.execute(sa.insert(artifact_table).prefix_with("OR REPLACE").values(**row))
            if publish:
                connection.execute(
                    sa.insert(outbox_table).prefix_with("OR REPLACE").values(kind=fidelity, key=key, done=0)
                )
        return True

    def evaluations(
        self, fidelity: Fidelity | None = None, status: Status | None = None, bad: list[str] | None = None
    ) -> list[Evaluation]:
        """Oldest first. Rows that cannot be read are left out and told in `bad`; without it they raise."""
        query = sa.select(evaluation_table).order_by(evaluation_table.c.id)
        if fidelity is not None:
            query = query.where(evaluation_table.c.fidelity == fidelity)
        if status is not None:
            query = query.where(evaluation_table.c.status == status)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        return _each(rows, evaluation_of, "evaluation", bad)

    def counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(evaluations, different candidates among them) by (fidelity, status); nothing else is read."""
        table = evaluation_table.c
        query = sa.select(
            table.fidelity, table.status, sa.func.count(), sa.func.count(sa.distinct(table.key))
        ).group_by(table.fidelity, table.status)
        with self._engine.connect() as connection:
            return {(f, s): (rows, keys) for f, s, rows, keys in connection.execute(query)}

    def evaluations_of(self, key: str) -> list[Evaluation]:
        """All evaluations of one candidate, oldest first."""
        query = sa.select(evaluation_table).where(evaluation_table.c.key == key).order_by(evaluation_table.c.id)
        with self._engine.connect() as connection:
            return [evaluation_of(row) for row in connection.execute(query)]

    def update_measurements(self, fidelity: Fidelity, fresh: Mapping[str, Mapping[str, Measurement]]) -> None:
        """Replace the measurements of complete evaluations (estimates change as the calibration learns), in one transaction."""
        if not fresh:
            return
        where = (
            (evaluation_table.c.key == sa.bindparam("k"))
            & (evaluation_table.c.fidelity == fidelity)
            & (evaluation_table.c.status == "complete")
        )
        rows = [{"k": key, "m": json.dumps({n: m.to_dict() for n, m in found.items()})} for key, found in fresh.items()]
        with self._engine.begin() as connection:
            connection.execute(sa.update(evaluation_table).where(where).values(measurements=sa.bindparam("m")), rows)

    def recover(self, most_attempts: int) -> int:
        """Mark evaluations of a dead process lost (failed for good after `most_attempts`); returns how many there were."""
        running = evaluation_table.c.status == "running"
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(evaluation_table)
                .where(running & (evaluation_table.c.attempt >= most_attempts))
                .values(status="failed", reason=f"the process died {most_attempts} times while evaluating it")
            )
            return int(
                connection.execute(
                    sa.update(evaluation_table).where(running).values(status="lost", reason="the process died")
                ).rowcount
            )

    def withdraw(self) -> int:
        """Forget evaluations that the user stopped: they are due again as if never tried. Returns how many there were."""
        with self._engine.begin() as connection:
            running = evaluation_table.c.status == "running"
            return int(connection.execute(sa.delete(evaluation_table).where(running)).rowcount)

    def artifact(self, key: str) -> Path | None:
        """Folder of a confirmed candidate's artifact."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(artifact_table.c.path).where(artifact_table.c.key == key)).first()
        return None if row is None else self.folder / row[0]

    def event(self, kind: str, text: str, **data: Any) -> None:
        """Append an event to the study's log with the present time. `data` must be JSON-able."""
        with self._engine.begin() as connection:
            connection.execute(
                sa.insert(event_table).values(at=now(), kind=kind, text=clean(text), data=json.dumps(data))
            )

    def events(self, last: int | None = None) -> list[Event]:
        """All events, or the `last` ones, oldest first; one whose details cannot be read says so."""
        query = sa.select(event_table).order_by(event_table.c.id.desc()).limit(last)
        with self._engine.connect() as connection:
            return [_event(r) for r in connection.execute(query)][::-1]

    def outbox(self) -> list[tuple[int, str, str]]:
        """What MLflow has not seen: (id, kind, key), oldest first."""
        with self._engine.connect() as connection:
            return [
                (r.id, r.kind, r.key)
                for r in connection.execute(
                    sa.select(outbox_table).where(outbox_table.c.done == 0).order_by(outbox_table.c.id)
                )
            ]

    def outbox_done(self, identity: int) -> None:
        """Mark the outbox row with this id as published."""
        with self._engine.begin() as connection:
            connection.execute(sa.update(outbox_table).where(outbox_table.c.id == identity).values(done=1))

    def refill_outbox(self) -> None:
        """Queue every confirmed candidate again: MLflow is rebuilt from here."""
        with self._engine.begin() as connection:
            connection.execute(sa.update(outbox_table).values(done=0))


def _checked(store: Store) -> Store:
    try:
        with told(store.folder, "the study database"):
            version = store.meta("schema")
    except BaseException:
        store.close()
        raise
    if version != SCHEMA_VERSION:
        store.close()
        raise UsageError(
            f"the study has schema {version}, this paretune reads {SCHEMA_VERSION}",
            "use the paretune version that wrote it",
        )
    return store


@contextmanager
def reading(store: Store) -> Iterator[None]:
    """Raise EnvironmentProblem if the study cannot be read: for its disk, its file, or rows that it has not written."""
    try:
        with told(store.folder, "the study database"):
            yield
    except UNREADABLE as error:
        raise EnvironmentProblem(
            f"the study {store.folder.name!r} cannot be read: {type(error).__name__}: {clean(str(error))[:300]}",
            "restore its folder from a backup",
        ) from error


def _each(rows: Iterable[Any], read: Callable[[Any], Row], what: str, bad: list[str] | None) -> list[Row]:
    if bad is None:
        return [read(row) for row in rows]
    found = []
    for row in rows:
        try:
            found.append(read(row))
        except UNREADABLE as error:
            bad.append(
                f"the {what} {str(row.key)[:20]} cannot be read: {type(error).__name__}: {clean(str(error))[:200]}"
            )
    return found


def _event(row: Any) -> Event:
    at, kind, text = (clean(str(value)) for value in (row.at, row.kind, row.text))
    try:
        return Event(at, kind, text, loads(row.data))
    except UNREADABLE as error:
        return Event(at, kind, f"{text} (its details cannot be read: {type(error).__name__})", {})
