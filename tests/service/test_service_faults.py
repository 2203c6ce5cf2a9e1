"""Faults around the queue: rows that cannot be read, a supervisor that meets errors, searches that end in odd ways, services that die."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from paretune.common.agent_access import TOKEN, TOKEN_FILE, given_token
from paretune.common.errors import DiskProblem, EnvironmentProblem, NothingFeasible, Shortage, UsageError
from paretune.search.budget import Budget
from paretune.search.execution import ending, secrets_kept
from paretune.search.execution.run import time_kept
from paretune.search.study.control import WrongState
from paretune.search.study.database import open_engine
from paretune.search.study.database_errors import database_problem, told
from paretune.search.study.store import Store
from paretune.service.data import Studies
from paretune.service.queue.job import Job
from paretune.service.queue.logs import SearchLog
from paretune.service.queue.outcomes import UNSEEN, Ended, Says, outcome_of, study_says
from paretune.service.queue.queue import Queue
from paretune.service.queue.supervisor import Supervisor
from paretune.service.server.app import create_app
from paretune.service.state import Service
from support.waiting import wait

KEY = "t" * 32
SPEC = {"budget": "5m"}
BAD_ROWS: dict[str, dict[str, Any]] = {
    "surrogate": {"settings": '{"field": "\\ud800"}'},
    "no-json": {"settings": "{"},
    "a-list": {"settings": "[]"},
    "infinite": {"settings": '{"loss_of_interest": Infinity}'},
    "no-state": {"settings": "{}", "state": "sleeping"},
    "bytes": {"settings": b"\xff\xfe"},
    "no-time": {"settings": "{}", "created": "yesterday"},
    "no-count": {"settings": "{}", "attempts": "many"},
}


@pytest.fixture
def home(simulated_home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(simulated_home, tmp_path / "home"))


@pytest.fixture
def queue(home: Path) -> Iterator[Queue]:
    found = Queue(home)
    yield found
    found.close()


@pytest.fixture
def client(queue: Queue) -> TestClient:
    service = Service(queue.home, Studies(queue.home), queue, KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    return TestClient(
        create_app(service), base_url="http://127.0.0.1:8765", headers=headers, raise_server_exceptions=False
    )


def script(text: str) -> Callable[[Job, Path, Path], list[str]]:
    return lambda job, spec, home: ["-c", textwrap.dedent(text), job.study, str(home)]


def insert(home: Path, **values: Any) -> None:
    row = {
        "state": "queued",
        "created": "2026-11-28T00:00:00+00:00",
        "attempts": 0,
        "started": "",
        "ended": "",
        "reason": "",
        **values,
    }
    with sqlite3.connect(home / "service" / "jobs.db") as database:
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        database.execute(f"INSERT INTO job ({names}) VALUES ({marks})", tuple(row.values()))


# rows that cannot be read


@pytest.mark.parametrize("name", BAD_ROWS)
def test_one_bad_row_of_the_queue_hides_no_other(name: str, queue: Queue, client: TestClient) -> None:
    queue.submit(SPEC, name="before")
    insert(queue.home, study=name, **BAD_ROWS[name])
    queue.submit(SPEC, name="after")
    rows = {row["study"]: row for row in client.get("/v1/queue").json()}
    assert (rows["before"]["position"], rows["after"]["position"]) == (1, 2)
    assert (
        rows[name]["state"] == "unreadable" and "cannot be read" in rows[name]["reason"] and rows[name]["position"] == 0
    )
    assert {told["study"] for told in client.get("/v1/studies").json()} >= {"before", "after", name, "nightly"}
    for path in ("/", f"/studies/{name}", f"/v1/studies/{name}", "/v1/health", "/studies/nightly"):
        assert client.get(path).status_code == 200, path
    assert queue.next_waiting().study == "before"  # type: ignore[union-attr]
    assert client.post(f"/v1/studies/{name}/resume", json={}).status_code == 409
    assert client.post(f"/v1/studies/{name}/cancel", json={}).json()["state"] == "cancelled"
    assert client.get("/v1/queue").status_code == 200


@pytest.mark.parametrize(
    "text", ['{"field": "\\ud800"}', '{"\\udcff": 1}', '{"teacher": "stdlib-coder", "profile": "\\u0000"}']
)
def test_what_no_list_could_show_is_not_stored(text: str, queue: Queue, client: TestClient) -> None:
    answer = client.post("/v1/studies", content=f'{{"spec": {text}}}', headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["error"]
    assert queue.jobs() == [] and client.get("/v1/queue").json() == []


@pytest.mark.parametrize("body", ['{"\\ud800": 1}', '{"name": "\\ud800"}', '{"spec": {}, "name": "a\\u0000"}'])
def test_a_refusal_of_such_text_can_be_sent(body: str, client: TestClient) -> None:
    answer = client.post("/v1/studies", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422 and answer.json()["error"]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE event SET data = '{' WHERE id = (SELECT min(id) FROM event)",
        "UPDATE candidate SET candidate = '{}' WHERE key = (SELECT key FROM candidate ORDER BY number DESC LIMIT 1)",
        "UPDATE evaluation SET measurements = 'x' WHERE id = (SELECT max(id) FROM evaluation WHERE fidelity = 'rung0')",
        "UPDATE event SET text = CAST(x'ff41' AS TEXT) WHERE id = (SELECT max(id) FROM event)",
    ],
)
def test_one_bad_row_of_a_study_leaves_it_readable(change: str, home: Path, client: TestClient) -> None:
    with sqlite3.connect(home / "studies" / "nightly" / "study.db") as database:
        database.execute(change)
    for path in ("/studies/nightly", "/v1/studies/nightly", "/v1/studies/nightly/front", "/v1/studies", "/"):
        assert client.get(path).status_code == 200, path
    assert client.get("/v1/studies").json()[0]["state"] == "complete"


def test_a_study_that_cannot_be_read_says_why_and_hides_no_other(home: Path, client: TestClient) -> None:
    shutil.copytree(home / "studies" / "nightly", home / "studies" / "broken")
    with sqlite3.connect(home / "studies" / "broken" / "study.db") as database:
        database.execute("UPDATE meta SET value = '{' WHERE name = 'spec'")
    rows = {told["study"]: told for told in client.get("/v1/studies").json()}
    assert rows["broken"]["state"] == "unreadable" and "cannot be read" in rows["broken"]["problem"]
    assert rows["nightly"]["state"] == "complete"
    assert client.get("/studies/broken").status_code == 503


def test_what_a_search_says_is_kept_as_text(home: Path) -> None:
    """A reason may name a file in Latin-1; the search must not end because of that."""
    store = Store.open_study(home / "studies" / "nightly")
    store.event("note", "caf\udce9")
    assert store.events(1)[0].text == "caf\\xe9"
    store.close()


# what SQLite says


def broken(folder: Path, content: bytes) -> EnvironmentProblem:
    (folder / "x.db").write_bytes(content)
    engine = open_engine(folder, "ro", "x.db")
    with pytest.raises(EnvironmentProblem) as caught, told(folder, "it"), engine.connect() as connection:
        connection.execute(sa.text("SELECT * FROM meta"))
    engine.dispose()
    return caught.value


def test_only_a_file_that_is_broken_is_called_so(tmp_path: Path) -> None:
    assert "is damaged" in broken(tmp_path, b"no database at all, but long enough to be one" * 100).problem
    assert "is damaged" in broken(tmp_path, b"").problem, "no tables"
    for code in ("FULL", "IOERR", "CANTOPEN", "READONLY", "BUSY", "LOCKED", "NOMEM", "PERM"):
        error = sqlite3.OperationalError("as SQLite says it")
        error.sqlite_errorcode = getattr(sqlite3, f"SQLITE_{code}")
        problem = database_problem(sa.exc.OperationalError("", {}, error), tmp_path)
        assert "is damaged" not in problem.problem and "backup" not in problem.remedy, code
        assert isinstance(problem, DiskProblem) == (code == "FULL"), code


# the supervisor


@pytest.fixture
def supervised(queue: Queue) -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def make(text: str = "", **options: Any) -> Supervisor:
        made.append(Supervisor(queue, backoff_s=0.05, hold_s=0.3, command=script(text), **options))
        return made[-1]

    yield make
    for supervisor in made:
        supervisor.stop(20)


def test_the_supervisor_survives_errors_and_says_so(
    queue: Queue, client: TestClient, supervised: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, fails, read = supervised(), threading.Event(), queue.jobs
    fails.set()

    def jobs() -> list[Job]:
        if fails.is_set() and threading.current_thread().name == "supervisor":
            raise RuntimeError("a bug of ours")
        return read()

    monkeypatch.setattr(queue, "jobs", jobs)
    study = queue.submit(SPEC)[0].study
    supervisor.start()
    wait(lambda: client.get("/v1/health").json()["status"] == "failing", what="health that says so")
    answer = client.get("/v1/health")
    assert answer.status_code == 503 and "RuntimeError" in answer.json()["problem"]
    assert "not started" in client.get("/").text
    fails.clear()
    wait(lambda: queue.job(study).state == "complete", what="going on")  # type: ignore[union-attr]
    wait(lambda: client.get("/v1/health").json()["status"] == "ok", what="health")


def test_what_fails_for_one_search_holds_up_no_other(
    queue: Queue, supervised: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = supervised("", at_once=2)
    real = supervisor._ended

    def ended(study: str, code: int) -> None:
        if study == "bad":
            raise RuntimeError("cannot be told")
        real(study, code)

    monkeypatch.setattr(supervisor, "_ended", ended)
    queue.submit(SPEC, name="bad"), queue.submit(SPEC, name="good")
    supervisor.start()
    wait(lambda: queue.job("good").state == "complete", what="the good one")  # type: ignore[union-attr]
    wait(lambda: supervisor.condition().state == "failing", what="the bad one's error")
    assert queue.job("bad").state == "running"  # type: ignore[union-attr]
    monkeypatch.setattr(supervisor, "_ended", real)
    wait(lambda: queue.job("bad").state == "complete", what="the bad one")  # type: ignore[union-attr]


def test_health_tells_of_a_dead_supervisor_and_of_none(
    queue: Queue, client: TestClient, supervised: Callable[..., Supervisor]
) -> None:
    assert client.get("/v1/health").json()["status"] == "ok"
    supervisor = supervised()
    supervisor.start()
    assert wait(lambda: client.get("/v1/health").status_code == 200)
    alive, supervisor._thread = supervisor._thread, threading.Thread()
    supervisor._thread.start()
    supervisor._thread.join()  # one that has ended
    answer = client.get("/v1/health")
    assert (answer.status_code, answer.json()["status"]) == (
        503,
        "stopped",
    ) and "start the service again" in answer.json()["problem"]
    assert "not started" in client.get("/").text
    supervisor._thread = alive


def test_a_search_that_cannot_be_started_waits(
    queue: Queue, supervised: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor, tries = supervised(), iter([OSError(24, "Too many open files"), OSError(11, "no more processes")])
    real = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        if (error := next(tries, None)) is not None:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr("paretune.service.queue.supervisor.subprocess.Popen", popen)
    study = queue.submit(SPEC)[0].study
    supervisor.start()
    job = wait(lambda: (j := queue.job(study)).state == "complete" and j, what="the end")  # type: ignore[union-attr]
    assert job.attempts == 0


def test_children_get_one_interrupt(queue: Queue, supervised: Callable[..., Supervisor]) -> None:
    supervisor = supervised(
        """
        import pathlib, signal, sys, time
        count, home = 0, pathlib.Path(sys.argv[2])
        def one(*_):
            global count
            count += 1
        signal.signal(signal.SIGINT, one)
        (home / "ready").touch()
        while not count: time.sleep(0.01)
        end = time.monotonic() + 1.5
        while time.monotonic() < end: time.sleep(0.01)
        (home / "interrupts").write_text(str(count)); sys.exit(130)
        """
    )
    study = queue.submit(SPEC)[0].study
    supervisor.start()
    wait((queue.home / "ready").exists, what="the start")
    supervisor.stop(20)
    assert (queue.home / "interrupts").read_text() == "1"
    job = queue.job(study)
    assert job is not None and job.state == "queued" and job.attempts == 0


NEEDS_SPACE = """
    import pathlib, sys
    from paretune.common.errors import DiskProblem
    from paretune.search.execution import ending
    ending.take()
    home = pathlib.Path(sys.argv[2])
    (home / "tries").open("a").write(sys.argv[1] + " ")
    if not (home / "space").exists():
        ending.tell(DiskProblem("the search needs about 1.4 GB of disk, but there are 0.1 GB free", "free some"))
        sys.exit(5)
"""


def test_a_lack_holds_the_queue_and_burns_nothing(
    queue: Queue, client: TestClient, supervised: Callable[..., Supervisor]
) -> None:
    supervisor = supervised(NEEDS_SPACE)
    studies = [queue.submit(SPEC)[0].study for _ in range(3)]
    supervisor.start()
    wait(
        lambda: len((queue.home / "tries").read_text().split()) >= 2 if (queue.home / "tries").exists() else False,
        what="trying",
    )
    jobs = queue.jobs()
    assert {job.state for job in jobs} <= {"queued", "running"} and all(job.attempts == 0 for job in jobs)
    assert set((queue.home / "tries").read_text().split()) == {studies[0]}, "the first keeps its place"
    wait(lambda: "1.4 GB" in client.get("/v1/health").json()["problem"], what="the reason")
    wait(lambda: "held: the search needs about 1.4 GB" in queue.job(studies[0]).reason, what="the job's reason")  # type: ignore[union-attr]
    (queue.home / "space").touch()
    wait(lambda: all(job.state == "complete" for job in queue.jobs()), what="going on")


def test_a_crash_of_a_taken_over_search_is_no_crash_and_keeps_its_place(
    queue: Queue, supervised: Callable[..., Supervisor]
) -> None:
    """As after kill -9 of the service: its search is resting, holds its study for a moment, and then has ended."""
    first, second = queue.submit(SPEC, name="first")[0].study, queue.submit(SPEC, name="second")[0].study
    folder = queue.home / "studies" / first
    shutil.copytree(queue.home / "studies" / "nightly", folder)
    store = Store.open_study(folder)
    store.set_meta(state="running")
    queue.put(first, "running", started="2026-11-28T00:00:00+00:00")
    supervisor = supervised(
        "import pathlib, sys; pathlib.Path(sys.argv[2], 'order').open('a').write(sys.argv[1] + ' ')"
    )
    supervisor.start()
    wait(lambda: first in supervisor.running, what="the taking over")
    store.set_meta(state="interrupted")
    store.close()
    wait(lambda: queue.job(second).state == "complete", what="both")  # type: ignore[union-attr]
    assert (queue.home / "order").read_text().split() == [first, second]
    job = queue.job(first)
    assert job is not None and job.attempts == 0


# how a search ended


def job_in(state: Any = "running", attempts: int = 0) -> Job:
    return Job("s", state, {}, attempts=attempts)


@pytest.mark.parametrize(
    ("job", "end", "state", "reason", "crashed"),
    [
        (job_in(), Ended(0, Says("complete")), "complete", "", False),
        (job_in(), Ended(3, Says("complete")), "complete", "budget ended", False),
        (
            job_in(),
            Ended(4, Says("interrupted", "the budget has ended", "", 90, 90), words='"folder": "…" }'),
            "failed",
            "no candidate was confirmed: the budget has ended; 90 s of 90 s were used",
            False,
        ),
        (job_in(), Ended(2, told=ending.Told("the rule", "the remedy")), "failed", "the rule; the remedy", False),
        (job_in(), Ended(5, told=ending.Told("no package", "install it")), "failed", "no package", False),
        (job_in(), Ended(5, told=ending.Told("disk", "free", passes=True)), "queued", "held: disk; free", False),
        (
            job_in(),
            Ended(5, Says("interrupted", "the disk is full (No space left on device)")),
            "queued",
            "held: the disk",
            False,
        ),
        (job_in(), Ended(1, lack="the disk is full"), "queued", "held: the disk is full", False),
        (job_in(), Ended(-7, lack="the disk is full"), "queued", "held: the disk is full", False),
        (job_in(attempts=2), Ended(1), "queued", "exit code 1", True),
        (job_in(attempts=3), Ended(-9, words="last"), "failed", "died 4 times, the last time by signal 9: last", True),
        (job_in(attempts=2), Ended(UNSEEN, Says("running")), "queued", "its service had ended; it goes on", False),
        (job_in(attempts=2), Ended(UNSEEN, Says("interrupted")), "queued", "its service had ended; it goes on", False),
        (job_in(), Ended(UNSEEN, Says("complete")), "complete", "", False),
        (job_in(), Ended(-2), "paused", "signal", False),
        (job_in("pausing"), Ended(130, Says("paused")), "paused", "", False),
        (job_in("pausing"), Ended(5, lack="the disk is full"), "paused", "the disk is full", False),
        (job_in("cancelling"), Ended(-9, Says("running")), "cancelled", "its process had died", False),
        (job_in("stopping"), Ended(0, Says("complete")), "complete", "", False),
        (job_in(), Ended(130, Says("interrupted"), service_ends=True), "queued", "the service ended", False),
    ],
)
def test_what_an_end_means(job: Job, end: Ended, state: str, reason: str, crashed: bool) -> None:
    found = outcome_of(job, end, 3)
    assert found.state == state and reason in found.reason and found.crashed == crashed
    assert "{" not in found.reason and "with its service" not in found.reason


def test_an_unreadable_study_is_no_error(home: Path) -> None:
    (home / "studies" / "nightly" / "study.db").write_bytes(b"x" * 5000)
    assert study_says(home / "studies" / "nightly").state == "unreadable"
    assert study_says(home / "studies" / "none") == Says()


def test_the_command_line_tells_the_service_why(tmp_path: Path) -> None:
    """Through a file in memory: also where the log's disk is full."""
    handle = os.memfd_create("told")
    (tmp_path / "s.yaml").write_text("budget: 1s\n")
    done = subprocess.run(
        [sys.executable, "-m", "paretune", "search", str(tmp_path / "s.yaml"), "--home", str(tmp_path / "home")],
        env={**os.environ, ending.VARIABLE: str(handle)},
        pass_fds=(handle,),
        stderr=Path("/dev/full").open("wb"),  # noqa: SIM115
        stdout=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    told = ending.read(handle)
    os.close(handle)
    assert done.returncode == 2 and told is not None and "at least 45 s" in told.problem and not told.passes


def test_a_shortage_passes() -> None:
    for kind, passes in (
        (DiskProblem, True),
        (Shortage, True),
        (EnvironmentProblem, False),
        (UsageError, False),
        (NothingFeasible, False),
    ):
        handle = os.memfd_create("told")
        ending._handles[:] = [handle]
        try:
            ending.tell(kind("a\ud800", "b"))
            assert ending.read(handle) == ending.Told("a\\ud800", "b", passes)
        finally:
            ending._handles.clear()
            os.close(handle)


def test_a_log_that_is_cut_keeps_the_words(tmp_path: Path) -> None:
    log = SearchLog(tmp_path / "x.log")
    log.path.write_text("talk\n" * 2000 + "error: the rule\nremedy: mend it\n")
    log.trim(5000)
    assert log.path.stat().st_size == 0 and log.words() == "error: the rule remedy: mend it"
    with log.path.open("a") as stream:
        stream.write('{\n "study": null\n}\n')
    assert log.words() == "error: the rule remedy: mend it"
    log.path.write_text('Traceback\nValueError: x\n{\n "a": 1\n}\n')
    log.before.unlink()
    assert log.words() == "Traceback ValueError: x"


# words in states that do not allow them


def test_a_complete_study_of_a_command_line_is_refused_and_not_adopted(queue: Queue, client: TestClient) -> None:
    answer = client.post("/v1/studies/nightly/resume", json={})
    assert answer.status_code == 409 and "nightly is complete" in answer.json()["error"]
    assert queue.jobs() == [] and not queue.spec_file("nightly").exists()
    for verb in ("pause", "stop", "cancel"):
        assert client.post(f"/v1/studies/nightly/{verb}", json={}).status_code == 409, verb
        assert client.post(f"/v1/studies/nobody/{verb}", json={}).status_code == 404, verb


def changed(home: Path, **meta: Any) -> None:
    store = Store.open_study(home / "studies" / "nightly")
    store.set_meta(**meta)
    store.close()


def test_a_used_budget_is_not_resumed(queue: Queue) -> None:
    changed(queue.home, state="interrupted", spent_s=300.0)
    with pytest.raises(WrongState, match="used 300 s of its budget of 300 s"):
        queue.resume("nightly")
    assert queue.jobs() == []
    changed(queue.home, spent_s=30.0)
    assert queue.resume("nightly").state == "queued" and queue.spec_file("nightly").exists()


def test_a_plug_ins_study_is_resumed_by_a_command_line_only(queue: Queue, client: TestClient) -> None:
    changed(queue.home, state="interrupted", spent_s=30.0, spec={"teacher": "plugin:mine", "budget": "5m"})
    answer = client.post("/v1/studies/nightly/resume", json={})
    assert answer.status_code == 422 and "paretune resume nightly" in answer.json()["remedy"]
    assert queue.jobs() == []


def test_a_plug_in_that_is_in_the_queue_is_not_started(queue: Queue, supervised: Callable[..., Supervisor]) -> None:
    insert(queue.home, study="old", settings='{"teacher": "plugin:mine"}')
    supervised("raise SystemExit('must not be started')").start()
    job = wait(lambda: (j := queue.job("old")).state == "failed" and j, what="the refusal")  # type: ignore[union-attr]
    assert "command line only" in job.reason


# secrets and time


def test_ray_gets_none_of_our_secrets(tmp_path: Path) -> None:
    names = ["PARETUNE_TOKEN", TOKEN, "PARETUNE_NOTIFY_SECRET", "PARETUNE_NOTIFY_URL", "PARETUNE_NOTIFY_COMMAND"]
    environment = dict.fromkeys(names, "s" * 20) | {"PATH": "/bin", "PARETUNE_HOME": "h", "RAY_AUTH_TOKEN": "ray's own"}
    environment[TOKEN_FILE] = "of the user"
    before = dict(environment)
    with secrets_kept.hidden(environment, str(tmp_path)) as folder:
        assert folder is not None and not set(names) & set(environment) and "s" * 20 not in environment.values()
        file = Path(environment[TOKEN_FILE])
        assert file.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
        assert environment["PATH"] == "/bin" and environment["RAY_AUTH_TOKEN"]
    assert environment == before and not folder.exists()


def test_workers_find_the_agents_token_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "a" * 30)
    with secrets_kept.hidden(os.environ, str(tmp_path)):
        assert TOKEN not in os.environ and given_token(tmp_path, "host_1") == "a" * 30
    assert os.environ[TOKEN] == "a" * 30 and TOKEN_FILE not in os.environ


def test_the_time_of_a_killed_search_counts(home: Path) -> None:
    store = Store.open_study(home / "studies" / "nightly")
    store.set_meta(spent_s=0.0)
    with time_kept(store, Budget(90.0), every_s=0.05):
        assert wait(lambda: store.meta("spent_s") > 0.1, what="the writing")  # what a SIGKILL now would leave
    store.close()


def test_a_budget_that_was_overrun_is_said() -> None:
    clock = iter([0.0, 112.0, 112.0])
    assert Budget(90.0, clock=lambda: next(clock)).over == "112 s were used of a budget of 90 s"
    assert Budget(90.0).over == ""


def test_no_work_may_outlive_the_budget(home: Path) -> None:
    from types import SimpleNamespace

    from paretune.search.estimation.costs import Costs
    from paretune.search.tasks.kinds import KINDS

    costs = Costs(None, None, SimpleNamespace(parameters=1e9), Budget(90.0, 60.0), None)  # type: ignore[arg-type]
    for kind in KINDS:
        assert 60.0 + costs.timeout_s(kind.most_s) < 90.0


def test_the_signal_of_a_killed_service_is_one(tmp_path: Path) -> None:
    """The kernel's own wish (launcher.py) is what a search gets when its service is killed."""
    text = f"""
        import subprocess, sys, time, os
        child = subprocess.Popen([sys.executable, "-m", "paretune.service.queue.launcher", str(os.getpid()), "--", "-c",
            "import time, pathlib, sys\\ntry:\\n pathlib.Path(sys.argv[1], 'up').touch(); time.sleep(60)\\nexcept KeyboardInterrupt:\\n "
            "pathlib.Path(sys.argv[1], 'rested').touch()", {str(tmp_path)!r}])
        time.sleep(60)
    """
    service = subprocess.Popen([sys.executable, "-c", textwrap.dedent(text)])
    wait((tmp_path / "up").exists, what="the start")
    service.send_signal(signal.SIGKILL)
    service.wait(240)
    wait((tmp_path / "rested").exists, what="the rest")
