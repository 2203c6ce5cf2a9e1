"""The service's queue: nothing is taken twice, nothing that was answered is lost, every word has one meaning in every state."""

import json
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.search.study import control
from paretune.search.study.store import Store
from paretune.service.queue import queue as module
from paretune.service.queue.job import Conflict, Job, QueueFull, Unknown, shown_state
from paretune.service.queue.queue import Queue

SMALL = {"budget": "60s"}


@pytest.fixture
def queue(tmp_path):
    found = Queue(tmp_path)
    yield found
    found.close()


def test_the_same_key_and_settings_are_one_job(queue):
    first, new = queue.submit(SMALL, "key-1")
    again, known = queue.submit(dict(SMALL), "key-1")
    assert new and not known and again == first
    assert queue.submit(SMALL)[0].study != first.study, "without a key every submit is a search"
    with pytest.raises(Conflict, match="other settings"):
        queue.submit({"budget": "61s"}, "key-1")
    assert len(queue.jobs()) == 2


def test_settings_are_checked_before_they_are_taken(queue):
    for wrong, word in (
        ({"budgett": "9m"}, "budgett"),
        ({"budget": "soon"}, "budget"),
        ({"objectives": ["nll"]}, "objectives"),
        ({"limits": {"decode_ms_per_token": -1}}, "limits"),
        ({"seed": "x" * 10_000}, "seed"),
    ):
        with pytest.raises(UsageError, match=word) as caught:
            queue.submit(wrong)
        assert len(str(caught.value)) < 700
    assert queue.jobs() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "a\0b", "-x", "x" * 90, "ä", "a b"])
def test_a_name_is_never_a_path(queue, name):
    with pytest.raises(UsageError):
        queue.submit(SMALL, name=name)


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "\n", "ä"])
def test_a_clients_key_is_plain(queue, key):
    with pytest.raises(UsageError, match="client's key"):
        queue.submit(SMALL, key)


def test_names_are_not_used_twice(queue, tmp_path):
    assert queue.submit(SMALL, name="mine")[0].study == "mine"
    with pytest.raises(Conflict):
        queue.submit(SMALL, name="mine")
    (tmp_path / "studies" / "theirs").mkdir(parents=True)
    with pytest.raises(Conflict):
        queue.submit(SMALL, name="theirs")


def test_five_hundred_submits_of_a_hundred_clients_are_a_hundred_jobs(queue):
    """Each client sends its five twice over, as one does whose connection broke."""

    def client(number):
        return [queue.submit({"seed": number * 5 + i}, f"{number}-{i}")[0].study for i in range(5) for _ in range(2)]

    with ThreadPoolExecutor(16) as pool:
        studies = [study for found in pool.map(client, range(100)) for study in found]
    jobs = queue.jobs()
    assert len(studies) == 1000 and len(set(studies)) == len(jobs) == 500
    assert sorted(job.settings["seed"] for job in jobs) == list(range(500))
    assert [job.position for job in jobs] == list(range(1, 501))


def test_the_queue_is_bounded(queue, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 2)
    queue.submit(SMALL), queue.submit(SMALL)
    with pytest.raises(QueueFull):
        queue.submit(SMALL)
    queue.cancel(queue.jobs()[0].study)
    queue.submit(SMALL)


def test_what_waits_is_cancelled_paused_and_resumed_at_once(queue):
    a, b = queue.submit(SMALL)[0], queue.submit(SMALL)[0]
    assert queue.cancel(a.study).state == "cancelled"
    assert queue.pause(b.study).state == "paused" == queue.pause(b.study).state
    assert queue.next_waiting() is None
    assert queue.resume(b.study).position == 1
    for verb in (queue.pause, queue.stop, queue.cancel, queue.resume):
        with pytest.raises(UsageError):
            verb(a.study)
        with pytest.raises(Unknown):
            verb("nobody")
    assert queue.stop(b.study).state == "cancelled", "what has not begun has nothing to complete"


def test_one_service_at_a_time(queue, tmp_path):
    with pytest.raises(EnvironmentProblem):
        Queue(tmp_path)


def test_what_was_answered_survives_a_kill(tmp_path):
    """A process submits and is killed without a chance to close anything."""
    script = (
        "import os, sys; from pathlib import Path; from paretune.service.queue.queue import Queue\n"
        "q = Queue(Path(sys.argv[1])); print(q.submit({'seed': 7}, 'k')[0].study, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    queue = Queue(tmp_path)
    assert [job.study for job in queue.jobs()] == [done.stdout.strip()]
    assert queue.submit({"seed": 7}, "k") == (queue.jobs()[0], False)
    assert json.loads(queue.spec_file(done.stdout.strip()).read_text()) == {"seed": 7}
    queue.close()


def test_its_database_is_durable(queue, tmp_path):
    connection = sqlite3.connect(tmp_path / "service" / "jobs.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


class QueueModel(RuleBasedStateMachine):
    """Against a dictionary: submits with and without keys, words, and a restart in between."""

    @initialize(folder=st.just(None))
    def begin(self, folder):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.queue = Queue(Path(self.folder.name))
        self.states, self.keys = {}, {}

    @rule(key=st.sampled_from([None, "a", "b", "c"]), seed=st.integers(0, 2))
    def submit(self, key, seed):
        try:
            job, new = self.queue.submit({"seed": seed}, key)
        except Conflict:
            assert key is not None and self.keys[key][1] != seed
            return
        if key in self.keys and key is not None:
            assert not new and self.keys[key] == (job.study, seed)
            return
        assert new and job.study not in self.states
        self.states[job.study] = "queued"
        if key is not None:
            self.keys[key] = (job.study, seed)

    @precondition(lambda self: self.states)
    @rule(number=st.integers(0, 20), verb=st.sampled_from(["pause", "resume", "stop", "cancel"]))
    def say(self, number, verb):
        study = sorted(self.states)[number % len(self.states)]
        before = self.states[study]
        after = {
            "queued": {"pause": "paused", "stop": "cancelled", "cancel": "cancelled"},
            "paused": {"pause": "paused", "resume": "queued", "stop": "cancelled", "cancel": "cancelled"},
        }.get(before, {})
        # a waiting search is put into the queue again without harm
        wanted = "queued" if (before, verb) == ("queued", "resume") else after.get(verb)
        try:
            got = getattr(self.queue, verb)(study).state
        except UsageError:
            assert wanted is None, (before, verb)
            return
        assert got == wanted, (before, verb)
        self.states[study] = got

    @rule()
    def restart(self):
        home = self.queue.home
        self.queue.close()
        self.queue = Queue(home)

    @invariant()
    def same(self):
        if hasattr(self, "queue"):
            assert {job.study: job.state for job in self.queue.jobs()} == self.states

    def teardown(self):
        if hasattr(self, "queue"):
            self.queue.close()
            self.folder.cleanup()


TestQueueModel = QueueModel.TestCase
TestQueueModel.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize(
    ("job", "study", "shown"),
    [
        ("queued", "interrupted", "queued"),
        ("running", "new", "running"),
        ("paused", "running", "running"),
        ("paused", "complete", "complete"),
        ("failed", "interrupted", "failed"),
        ("failed", "complete", "complete"),
        ("cancelled", None, "cancelled"),
        (None, "paused", "paused"),
    ],
)
def test_what_is_shown_is_what_happens_whoever_does_it(job, study, shown):
    assert shown_state(None if job is None else Job("s", job, {}), study) == shown


def test_a_search_of_the_command_line_obeys_without_becoming_a_job(queue, tmp_path, simulated_home):
    """Its lock is held as a search holds it. It is told what it was asked, and the queue stays empty."""
    folder = Path(shutil.copytree(simulated_home / "studies" / "nightly", tmp_path / "studies" / "nightly"))
    store = Store.open_study(folder)
    store.set_meta(state="running")
    assert queue.pause("nightly").state == "pausing" and control.ordered(folder) == "pause"
    assert queue.cancel("nightly").state == "cancelling" and control.ordered(folder) == "cancel"
    assert queue.jobs() == []
    with pytest.raises(UsageError, match="rests"):
        queue.resume("nightly")
    store.set_meta(state="complete")
    store.close()
    with pytest.raises(UsageError, match="has ended"):
        queue.resume("nightly")
