"""The supervisor with real processes: searches that end, crash, hang, are steered, and services that die."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from paretune.search.study.control import state_of
from paretune.search.study.database import is_taken
from paretune.search.study.store import Store
from paretune.service.queue.queue import Queue
from paretune.service.queue.supervisor import Supervisor
from support.waiting import wait

SPEC = {"budget": "5m", "fit_points": 30, "max_candidates": 16, "finalists": 1}
# In the search's own process: tests/search/test_control.py and tests/e2e/test_kill.py steer and kill searches that Ray runs.
SIMULATED = {
    "PARETUNE_EXECUTOR": "inline",
    "PARETUNE_EVALUATOR": "paretune.search.evaluators.simulated:SimulatedEvaluator",
    "PARETUNE_SIMULATED_SLEEP": "0.1",
}


def study_state(folder):
    return state_of(folder) if (folder / "study.db").is_file() else ""


def script(text):
    return lambda job, spec, home: ["-c", textwrap.dedent(text), job.study, str(home)]


@pytest.fixture
def made(tmp_path):
    """Makes supervisors with a queue each, and ends them."""
    alive = []

    def make(command=None, **options):
        queue = Queue(tmp_path)
        more = {} if command is None else {"command": command}
        supervisor = Supervisor(queue, backoff_s=0.05, **more, **options)
        alive.append(supervisor)
        return queue, supervisor

    yield make
    for supervisor in alive:
        if not supervisor._ending.is_set():
            supervisor.stop(20)
            supervisor.queue.close()


@pytest.mark.parametrize(
    ("code", "state", "word"),
    [
        (0, "complete", ""),
        (3, "complete", "budget"),
        (2, "failed", "rule"),
        (4, "failed", "rule"),
        (5, "failed", "rule"),
    ],
)
def test_how_a_search_ends_is_written_with_its_words(made, code, state, word):
    queue, supervisor = made(script(f"import sys; print('error: the rule'); sys.exit({code})"))
    study = queue.submit(SPEC)[0].study
    supervisor.start()
    job = wait(lambda: (j := queue.job(study)).state == state and j, what=state)
    assert word in job.reason and job.attempts == 0 and job.ended


def test_searches_run_in_order_and_no_more_than_are_allowed(made, tmp_path):
    text = """
        import pathlib, sys, time
        log = pathlib.Path(sys.argv[2], "order.txt")
        log.open("a").write(f"+{sys.argv[1]}\\n"); time.sleep(0.3); log.open("a").write(f"-{sys.argv[1]}\\n")
    """
    queue, supervisor = made(script(text))
    studies = [queue.submit(SPEC)[0].study for _ in range(3)]
    supervisor.start()
    wait(lambda: all(j.state == "complete" for j in queue.jobs()), what="the end of three")
    assert (tmp_path / "order.txt").read_text().split() == [f"{sign}{s}" for s in studies for sign in "+-"]


def test_a_crash_is_started_again_a_few_times(made):
    queue, supervisor = made(script("import os; os.kill(os.getpid(), 9)"), most_restarts=2)
    study = queue.submit(SPEC)[0].study
    supervisor.start()
    job = wait(lambda: (j := queue.job(study)).state == "failed" and j, what="giving up")
    assert job.attempts == 3 and "died 3 times, the last time by signal 9" in job.reason


def test_one_that_crashes_keeps_its_place_and_holds_up_its_own_only(made, tmp_path):
    """What waits behind it may run for a night. Its place is one of those that run at once, until it is given up."""
    text = """
        import os, pathlib, sys
        with open(pathlib.Path(sys.argv[2], "begun.txt"), "a") as begun:
            print(sys.argv[1], file=begun)
        if sys.argv[1] == "bad":
            os.kill(os.getpid(), 9)
    """
    queue, supervisor = made(script(text), most_restarts=2)
    queue.submit(SPEC, name="bad"), queue.submit(SPEC, name="good")
    supervisor.backoff_s = 0.5
    supervisor.start()
    wait(lambda: queue.job("good").state == "complete", what="the good one")
    assert (tmp_path / "begun.txt").read_text().split() == ["bad", "bad", "bad", "good"]
    assert queue.job("bad").state == "failed"


def test_beside_one_that_crashes_others_run(made):
    text = "import os, sys; os.kill(os.getpid(), 9) if sys.argv[1] == 'bad' else None"
    queue, supervisor = made(script(text), most_restarts=1000, at_once=2)
    queue.submit(SPEC, name="bad"), queue.submit(SPEC, name="good"), queue.submit(SPEC, name="fine")
    supervisor.backoff_s = 1.0
    supervisor.start()
    wait(lambda: queue.job("good").state == queue.job("fine").state == "complete", what="the good ones")
    assert queue.job("bad").state in ("queued", "running")


def test_a_search_gets_the_threads_that_it_may_use_and_a_group_of_its_own(made, tmp_path):
    text = """
        import os, pathlib, sys
        pathlib.Path(sys.argv[2], "seen.txt").write_text(f"{os.environ['OMP_NUM_THREADS']} {os.getpgid(0) == os.getpid()}")
    """
    queue, supervisor = made(script(text), threads=1)
    queue.submit(SPEC)
    supervisor.start()
    wait(lambda: queue.jobs()[0].state == "complete")
    assert (tmp_path / "seen.txt").read_text() == "1 True"


def test_a_log_does_not_eat_the_disk(made, monkeypatch):
    monkeypatch.setattr("paretune.service.queue.supervisor.MOST_LOG_BYTES", 10_000)
    text = "import time\nfor _ in range(40): print('x' * 1000, flush=True); time.sleep(0.05)"
    queue, supervisor = made(script(text))
    study = queue.submit(SPEC)[0].study
    supervisor.start()
    sizes = []
    while queue.job(study).state != "complete":
        sizes.append(supervisor.log_file(study).stat().st_size if supervisor.log_file(study).exists() else 0)
        time.sleep(0.02)
    assert max(sizes) < 25_000


def test_at_the_services_end_a_search_rests_and_the_next_service_goes_on(made):
    queue, supervisor = made(environment=SIMULATED)
    study = queue.submit(SPEC)[0].study
    folder = queue.home / "studies" / study
    supervisor.start()
    wait(lambda: study_state(folder) == "running" and explored(folder) >= 3, what="exploring")
    supervisor.stop(60)
    assert queue.job(study).state == "queued" and study_state(folder) == "interrupted"
    queue.close()
    queue, supervisor = made(environment=SIMULATED)
    supervisor.start()
    wait(lambda: queue.job(study).state == "complete", what="the end")
    assert [e.text[:8] for e in events(folder) if e.kind == "launch"] == ["launch 1", "launch 2"]


def test_a_search_is_paused_resumed_stopped_and_cancelled(made):
    queue, supervisor = made(environment=SIMULATED)
    one, two = queue.submit(SPEC)[0].study, queue.submit(SPEC)[0].study
    supervisor.start()
    folder = queue.home / "studies" / one
    wait(lambda: study_state(folder) == "running" and explored(folder) >= 3, what="exploring")
    assert queue.pause(one).state == "pausing"
    wait(lambda: queue.job(one).state == "paused", what="the pause")
    second = queue.home / "studies" / two
    wait(lambda: study_state(second) == "running" and explored(second) >= 1, what="the second's turn")
    assert queue.cancel(two).state == "cancelling"
    wait(lambda: queue.job(two).state == "cancelled", what="the cancelling")
    assert study_state(second) == "cancelled"
    assert queue.resume(one).state == "queued"
    wait(lambda: queue.job(one).state == "running" and study_state(folder) == "running", what="going on")
    assert queue.stop(one).state == "stopping"
    wait(lambda: queue.job(one).state == "complete", what="the stop")
    assert study_state(folder) == "complete"


def test_a_word_to_a_search_that_is_only_starting_is_kept(made):
    queue, supervisor = made(environment=SIMULATED)
    study = queue.submit(SPEC)[0].study
    supervisor.start()
    wait(lambda: queue.job(study).state == "running", what="the start")
    assert queue.cancel(study).state == "cancelling"
    wait(lambda: queue.job(study).state == "cancelled", what="the cancelling")


def test_a_killed_service_leaves_no_orphan_and_the_next_one_goes_on(made, tmp_path):
    text = """
        import sys, time; from pathlib import Path
        from paretune.service.queue.queue import Queue; from paretune.service.queue.supervisor import Supervisor
        supervisor = Supervisor(Queue(Path(sys.argv[1]))); supervisor.start(); time.sleep(600)
    """
    queue, _ = made()
    study = queue.submit(SPEC)[0].study
    queue.close()
    folder = tmp_path / "studies" / study
    service = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text), str(tmp_path)], env={**os.environ, **SIMULATED}
    )
    try:
        wait(lambda: study_state(folder) == "running" and explored(folder) >= 2, what="exploring")
    finally:
        service.send_signal(signal.SIGKILL)
        service.wait(240)
    queue, supervisor = made(environment=SIMULATED)
    assert queue.job(study).state == "running", "as the dead one left it"
    supervisor.start()
    wait(lambda: queue.job(study).state == "complete", what="the end")
    assert not is_taken(folder)


def test_a_search_that_a_command_line_ends_is_no_crash(made, simulated_home, tmp_path):
    """A job waits, a command line goes on with its study: the service watches, and takes over how it ended."""
    queue, supervisor = made(script("raise SystemExit('nothing is to be started')"))
    queue.submit(SPEC, name="nightly")
    folder = Path(shutil.copytree(simulated_home / "studies" / "nightly", tmp_path / "studies" / "nightly"))
    store = Store.open_study(folder)
    store.set_meta(state="running")
    supervisor.start()
    wait(lambda: queue.job("nightly").state == "running", what="the watching")
    store.set_meta(state="complete")
    store.close()
    job = wait(lambda: (j := queue.job("nightly")).state == "complete" and j, what="the end")
    assert job.attempts == 0


def explored(folder):
    store = Store.reader(folder)
    try:
        return len(store.evaluations("rung0", "complete"))
    finally:
        store.close()


def events(folder):
    store = Store.reader(folder)
    try:
        return store.events()
    finally:
        store.close()
