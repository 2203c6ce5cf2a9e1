"""The store: acknowledged rows stay, late results are refused, one writer, readers never block."""

import multiprocessing
import os
import signal
import time

import pytest

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores
from paretune.search.study.database import is_taken
from paretune.search.study.store import Store
from paretune.spaces.candidate import Candidate, Layer

CANDIDATE = Candidate((Layer(64, 1),) * 2)
OTHER = Candidate((Layer(64, 1),) * 3)


def new_store(tmp_path, name="one"):
    return Store.create(tmp_path / name, {"state": "new", "spec": {}})


def test_round_trip_of_an_evaluation(tmp_path):
    store = new_store(tmp_path)
    assert store.add_candidate(CANDIDATE, "sampler", {"depth": 2})
    assert not store.add_candidate(CANDIDATE, "sampler", {"depth": 2})
    assert store.start(CANDIDATE.key, "rung0") == 1
    m, s = Measurement(1.5, "ms", 1.4, 1.6, "measured", 9, "abc", "n"), Scores(("a", "b"), (1.0, 2.0), (3, 4))
    assert store.finish(
        CANDIDATE.key, "rung0", "complete", measurements={"x": m}, scores=s, facts={"f": 1}, seconds=2.5
    )
    store.close()
    (found,) = Store.reader(tmp_path / "one").evaluations("rung0", "complete")
    assert (found.measurements["x"], found.scores, found.facts, found.seconds) == (m, s, {"f": 1}, 2.5)
    (row,) = Store.reader(tmp_path / "one").candidates()
    assert row.candidate == CANDIDATE and row.params == {"depth": 2} and row.number == 0


def test_a_late_result_is_refused(tmp_path):
    store = new_store(tmp_path)
    store.add_candidate(CANDIDATE, "sampler", {})
    store.start(CANDIDATE.key, "rung0")
    assert store.recover(3) == 1
    assert not store.finish(CANDIDATE.key, "rung0", "complete")
    assert [e.status for e in store.evaluations()] == ["lost"]


def test_an_evaluation_that_kills_its_process_is_given_up(tmp_path):
    store = new_store(tmp_path)
    store.add_candidate(CANDIDATE, "sampler", {})
    for attempt in (1, 2, 3):
        assert store.start(CANDIDATE.key, "rung0") == attempt
        store.recover(3)
    assert [e.status for e in store.evaluations()] == ["lost", "lost", "failed"]


def test_second_writer_is_refused_and_reader_is_not(tmp_path):
    store = new_store(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"running on the study 'one'.*pid"):
        Store.open_study(tmp_path / "one")
    assert Store.reader(tmp_path / "one").meta("state") == "new"
    store.close()
    Store.open_study(tmp_path / "one").close()


def test_unknown_study_names_the_known_ones(tmp_path):
    new_store(tmp_path).close()
    with pytest.raises(UsageError, match="no study is called 'two'; known studies: one"):
        Store.reader(tmp_path / "two")


def test_damaged_database_is_refused(tmp_path):
    store = new_store(tmp_path)
    store.close()
    path = tmp_path / "one" / "study.db"
    path.write_bytes(b"\0" * 5000)
    for extra in ("study.db-wal", "study.db-shm"):
        (tmp_path / "one" / extra).unlink(missing_ok=True)
    with pytest.raises(EnvironmentProblem, match="damaged"):
        Store.reader(tmp_path / "one")


def test_newer_schema_is_refused(tmp_path):
    store = new_store(tmp_path)
    store.set_meta(schema=99)
    store.close()
    with pytest.raises(UsageError, match="schema 99"):
        Store.open_study(tmp_path / "one")


def test_reader_cannot_write(tmp_path):
    new_store(tmp_path).close()
    with pytest.raises(Exception, match="readonly"):
        Store.reader(tmp_path / "one").set_meta(x=1)


def _writer(folder, acknowledged):
    store = Store.open_study(folder)
    for i in range(100_000):
        candidate = Candidate((Layer(64 * (i + 1), 1),))
        store.add_candidate(candidate, "sampler", {})
        store.start(candidate.key, "rung0")
        store.finish(candidate.key, "rung0", "complete", facts={"i": i})
        acknowledged.send(i)


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.45])
def test_nothing_acknowledged_is_lost_by_sigkill(tmp_path, delay):
    new_store(tmp_path).close()
    receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_writer, args=(tmp_path / "one", send))
    process.start()
    last = receive.recv()
    time.sleep(delay)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while receive.poll():
        last = receive.recv()
    store = Store.open_study(tmp_path / "one")
    complete = [e.facts["i"] for e in store.evaluations("rung0", "complete")]
    assert complete[: last + 1] == list(range(last + 1)), "an acknowledged row is missing or doubled"
    assert len(complete) <= last + 2
    store.recover(3)
    assert all(e.status != "running" for e in store.evaluations())


def test_outbox_is_written_with_the_result_and_can_be_refilled(tmp_path):
    store = new_store(tmp_path)
    store.add_candidate(CANDIDATE, "sampler", {})
    store.start(CANDIDATE.key, "confirmed")
    store.finish(
        CANDIDATE.key, "confirmed", "complete", publish=True, artifact=(store.folder / "artifacts" / "x", "00")
    )
    ((identity, kind, key),) = store.outbox()
    assert (kind, key) == ("confirmed", CANDIDATE.key)
    assert store.artifact(CANDIDATE.key) == store.folder / "artifacts" / "x"
    store.outbox_done(identity)
    assert store.outbox() == []
    store.refill_outbox()
    assert len(store.outbox()) == 1


def test_whether_a_study_runs_is_asked_of_its_lock(tmp_path):
    store = new_store(tmp_path)
    assert is_taken(tmp_path / "one")
    store.close()
    assert not is_taken(tmp_path / "one")
    assert not is_taken(tmp_path / "nothing there")
    Store.open_study(tmp_path / "one").close()


def test_what_the_user_stopped_is_no_attempt(tmp_path):
    store = new_store(tmp_path)
    store.add_candidate(CANDIDATE, "sampler", {})
    for _ in range(5):
        assert store.start(CANDIDATE.key, "rung0") == 1
        assert store.withdraw() == 1
    assert store.evaluations() == [] and store.withdraw() == 0
    store.start(CANDIDATE.key, "rung0")
    store.finish(CANDIDATE.key, "rung0", "complete")
    assert store.withdraw() == 0 and len(store.evaluations()) == 1


def test_a_folder_that_cannot_be_written_is_said_to_be(tmp_path):
    new_store(tmp_path).close()
    (tmp_path / "one" / "lock").unlink()
    (tmp_path / "one" / "lock").mkdir()
    with pytest.raises(EnvironmentProblem, match=r"cannot be written: Is a directory"):
        Store.open_study(tmp_path / "one")


def test_a_study_on_a_read_only_disk_is_still_read(tmp_path, monkeypatch):
    """Without the files that a reader of WAL makes beside it."""
    store = new_store(tmp_path)
    store.add_candidate(CANDIDATE, "sampler", {})
    store.close()
    folder = tmp_path / "one"
    assert not (folder / "study.db-wal").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    reader = Store.reader(folder)
    assert len(reader.candidates()) == 1
    assert not (folder / "study.db-shm").exists(), "it would have been made on a disk that can be written"
    reader.close()


def test_a_reader_never_meets_a_half_made_study(tmp_path, monkeypatch):
    seen, whole = [], Store.set_meta

    def looked_at(store, **values):
        seen.append((tmp_path / "s" / "study.db").exists())
        whole(store, **values)
        seen.append((tmp_path / "s" / "study.db").exists())

    monkeypatch.setattr(Store, "set_meta", looked_at)
    new_store(tmp_path, "s").close()
    assert seen == [False, False]
    reader = Store.reader(tmp_path / "s")
    assert reader.meta("state") == "new"
    reader.close()


def test_a_creation_that_died_is_done_anew(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "unborn.db").write_bytes(b"half of a file")
    (tmp_path / "s" / "unborn.db-wal").write_bytes(b"half of a log")
    store = new_store(tmp_path, "s")
    assert store.meta("state") == "new"
    store.close()
    assert not list((tmp_path / "s").glob("unborn*"))
