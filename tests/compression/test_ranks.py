"""Processes that are started and ended together: whoever dies, none is left and the reason is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paretune.common.errors import EnvironmentProblem
from paretune.compression.network.ranks import run_ranks

AS_RANK = "from paretune.compression.network.ranks import as_rank\nimport os, signal, sys, time\n"


def program(folder: Path, body: str) -> list[str]:
    file = folder.parent / f"{folder.name}.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(
        f"{AS_RANK}def work(folder, rank, ranks):\n"
        "    (folder / f'own{rank}').write_text(str(os.getpid()))\n"
        "    os.replace(folder / f'own{rank}', folder / f'pid{rank}')\n"
        f"{lines}as_rank(work)\n"
    )
    return [str(file)]


def living(folder: Path) -> list[int]:
    """Ranks that still run; one that is dead and only not yet collected does not."""
    return [pid for file in folder.glob("pid*") if runs(pid := int(file.read_text()))]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "if rank == 1: raise ValueError('no such tensor')\ntime.sleep(60)",
            "rank 1 of 2 failed: ValueError: no such tensor",
        ),
        (
            "if rank == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)",
            "rank 0 of 2 failed: it was ended by SIGKILL",
        ),
        (
            "if rank == 1:\n  print('last words', file=sys.stderr, flush=True)\n  os._exit(7)\ntime.sleep(60)",
            "exit status 7: last words",
        ),
        (
            "if rank == 1: raise ValueError('the cause')\ntime.sleep(0.3)\nraise ValueError('a neighbour is gone')",
            "the cause",
        ),
    ],
)
def test_a_rank_that_dies_ends_all_with_its_reason(body: str, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    with pytest.raises(EnvironmentProblem, match=re.escape(words)):
        run_ranks(program(folder, body), 2, folder, 60)
    assert not living(folder)


def test_ranks_that_hang_are_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    with pytest.raises(EnvironmentProblem, match=r"2 ranks were not done after 1\.5 s"):
        run_ranks(program(folder, "time.sleep(60)"), 2, folder, 1.5)
    assert not living(folder)


def test_all_wait_for_the_last_and_a_good_end_is_silent(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    run_ranks(program(folder, "time.sleep(0.5 * rank)\n(folder / f'end{rank}').touch()"), 2, folder, 60)
    assert (folder / "end0").exists() and (folder / "end1").exists() and not living(folder)


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    arguments = program(folder, "time.sleep(60)")
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path\nfrom paretune.compression.network.ranks import run_ranks\n"
            f"run_ranks({arguments!r}, 2, Path({str(folder)!r}), 60)",
        ]
    )
    deadline = time.monotonic() + 120
    while len(list(folder.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(living(folder)) == 2
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    while living(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not living(folder)
