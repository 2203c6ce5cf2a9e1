"""SIGKILL at random moments with real Ray processes: the same command goes on, nothing finished is lost or repeated."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from paretune.common.checksums import CHECKSUMS, sha256
from paretune.search.front import non_dominated
from paretune.search.study.store import Store
from paretune.search.study.view import load_view

SPEC = """
budget: 5m
fit_points: 30
max_candidates: 60
finalists: 2
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    environment = {
        **os.environ,
        "PARETUNE_EVALUATOR": "paretune.search.evaluators.simulated:SimulatedEvaluator",
        "PARETUNE_SIMULATED_SLEEP": "0.05",
        "OMP_NUM_THREADS": "1",
    }

    def start():
        arguments = [sys.executable, "-m", "paretune", "search", "spec.yaml", "--home", "home", "--json"]
        return subprocess.Popen(
            arguments,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    return start


def group_members(group):
    """Processes of the search's own process group that still live (a zombie waits for init, it does not live)."""
    found = []
    for path in (p.name for p in Path("/proc").glob("[0-9]*")):
        try:
            state = Path(f"/proc/{path}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if os.getpgid(int(path)) == group and state != "Z":
                found.append((int(path), Path(f"/proc/{path}/cmdline").read_text()))
        except (ProcessLookupError, FileNotFoundError):
            pass
    return found


def kept_rows(folder):
    store = Store.reader(folder)
    rows = {(e.key, e.fidelity): e.at for e in store.evaluations(status="complete")}
    store.close()
    return rows


@pytest.mark.timeout(280)
def test_sigkill_at_random_moments_loses_nothing(command, tmp_path):
    generator = random.Random(os.environ.get("KILL_SEED", "7"))
    before: dict[tuple[str, str], str] = {}
    kills, groups = 0, []
    for _ in range(3):
        process = command()
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            folder = next((tmp_path / "home" / "studies").glob("*/study.db"), None)
            if folder is not None and len(kept_rows(folder.parent)) > len(before) + 2:
                break
            time.sleep(0.1)
        time.sleep(generator.uniform(0.0, 2.0))
        assert process.poll() is None, f"the search ended by itself: {process.stderr.read().decode()[-2000:]}"
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        groups.append(process.pid)
        time.sleep(3)
        left = [name for _, name in group_members(process.pid) if "Agent" not in name]
        assert left == [], "children outlived the search (Ray's own agents take a minute, the next launch ends them)"
        folder = next((tmp_path / "home" / "studies").glob("*/study.db")).parent
        after = kept_rows(folder)
        assert before.items() <= after.items(), "a finished evaluation was lost or done again"
        assert sqlite3.connect(folder / "study.db").execute("pragma integrity_check").fetchone() == ("ok",)
        report = folder / "report.html"
        assert not report.exists() or report.read_text().endswith("</html>\n"), "half a report"
        before = after
    process = command()
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err.decode()[-3000:]
    folder = next((tmp_path / "home" / "studies").glob("*/study.db")).parent
    assert len(list((tmp_path / "home" / "studies").iterdir())) == 1, "the same command must continue the same study"
    after = kept_rows(folder)
    assert before.items() <= after.items()
    assert [m for group in groups for m in group_members(group)] == []
    store = Store.reader(folder)
    done = Counter(
        line
        for line in (folder / "simulated.log").read_text().splitlines()
        if line.split()[0] in ("rung0", "recover", "confirm")
    )
    assert sum(n - 1 for n in done.values()) <= kills, "more than the work in flight was repeated"
    assert all(e.status != "running" for e in store.evaluations())
    view = load_view(store)
    assert view.meta["launches"] == kills + 1 and view.meta["state"] == "complete"
    for point in view.confirmed:
        artifact = store.artifact(point.key)
        assert artifact is not None and sha256(artifact / CHECKSUMS)
    assert {p.key for p in view.front} == {
        view.confirmed[i].key for i in non_dominated([p.vector(view.objectives) for p in view.confirmed])
    }
    assert json.loads(out)["confirmed"] == len(view.confirmed)


@pytest.mark.timeout(120)
def test_ctrl_c_ends_in_good_order_and_is_resumable(command, tmp_path):
    process = command()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        folder = next((tmp_path / "home" / "studies").glob("*/study.db"), None)
        if folder is not None and len(kept_rows(folder.parent)) > 5:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err.decode()[-2000:]
    assert b"continue it with the same command" in err
    assert folder is not None
    store = Store.reader(folder.parent)
    assert store.meta("state") == "interrupted"
    assert (folder.parent / "report.html").exists()
