"""Memory of a whole search: driver, worker, engine children and Ray's daemons, sampled while it runs.

RSS counts a page that several processes share in each of them; PSS divides it among them, so the sum over a process tree is
what the tree really holds. `peak_rss_gb_135m` is that sum at its highest; the plain sum of RSS stands beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import HOME, Figure, figure, search_command
from paretune.search.execution.processes import descendants
from paretune.search.study.store import Store
from paretune.search.study.view import load_view

EVERY_S = 1.0
PEAKS = ("driver_rss_mb", "worker_rss_mb", "ray_rss_mb")


def memory_mb() -> Iterator[Figure]:
    """Peak resident memory of driver, worker and Ray's daemons during 100 s of a real search, in a home of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = search_command("--budget", "100s", "--home", Path(folder) / "home")
        peak, _ = watch(command, dict(os.environ), Path(folder))
    for name in PEAKS:
        yield figure(name, peak[name], "MB")


def peak_rss_gb_135m() -> Iterator[Figure]:
    """Peak memory of a whole search on a checkpoint of 135M random weights; PARETUNE_BENCH_BUDGET (1h) is how long it runs.

    Random weights say nothing about quality. Home and study stay in <home>/bench-135m, with the report.
    """
    from benchmarks.make_checkpoint import make_checkpoint

    budget = os.environ.get("PARETUNE_BENCH_BUDGET", "1h")
    home = HOME / "bench-135m"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    make_checkpoint(home / "checkpoint")
    command = search_command("--teacher", home / "checkpoint", "--budget", budget, "--home", home, "--study", "random")
    start = time.monotonic()
    peak, code = watch(command, dict(os.environ), home)
    store = Store.reader(home / "studies" / "random")
    view, spent = load_view(store), store.meta("spent_s")
    store.close()
    yield figure(
        "peak_rss_gb_135m",
        peak["tree_pss_mb"] * 2**20 / 1e9,
        "GB",
        tree_rss_gb=peak["tree_rss_mb"] * 2**20 / 1e9,
        **{name.replace("_mb", "_gb"): peak[name] * 2**20 / 1e9 for name in PEAKS},
        budget=budget,
        exit_code=code,
        wall_s=time.monotonic() - start,
        spent_s=spent,
        explored=len(view.rung0),
        confirmed=len(view.confirmed),
        front=len(view.front),
        parameters=view.meta["teacher"]["parameters"],
    )


def watch(command: list[str], environment: dict[str, str], folder: Path) -> tuple[dict[str, float], int]:
    """Run a search; the peaks in MB (2^20 bytes) of what `resident` finds, and its exit code."""
    with (folder / "search.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        peak: dict[str, float] = {}
        while process.poll() is None:
            for name, value in resident(process.pid).items():
                peak[name] = max(peak.get(name, 0.0), value)
            time.sleep(EVERY_S)
    return peak, process.returncode


def resident(driver: int) -> dict[str, float]:
    """MB now: RSS of the driver, of the biggest worker, of all other Ray processes together; PSS and RSS of the whole tree."""
    whole = memory_of(driver)
    found = {"driver_rss_mb": whole["Rss"], "worker_rss_mb": 0.0, "ray_rss_mb": 0.0}
    tree = dict(whole)
    for pid, _ in descendants(driver):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        own = memory_of(pid)
        tree = {kind: tree[kind] + own[kind] for kind in tree}
        if "ray::ResourceTrainable" in name or "ray::StudyWorker" in name:
            found["worker_rss_mb"] = max(found["worker_rss_mb"], own["Rss"])
        elif "ray" in name and "paretune.engines" not in name:
            found["ray_rss_mb"] += own["Rss"]
    return {**found, "tree_rss_mb": tree["Rss"], "tree_pss_mb": tree["Pss"]}


def memory_of(pid: int) -> dict[str, float]:
    """{"Rss", "Pss"} of a process in MB; zeros if it is gone."""
    found = {"Rss": 0.0, "Pss": 0.0}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) / 1024
    except OSError:
        pass
    return found
