"""Several processes of this machine that work on one thing: started together, and ended together.

The launcher starts `python ARGUMENTS FOLDER RANK RANKS` once per rank. A rank that fails ends all of them, and its own words
are the reason, not those of the ranks that merely lost their neighbour. A launcher that dies takes its ranks with it. Ranks meet
through a file in the launcher's temporary folder and talk over the loopback interface only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from paretune.common.errors import EnvironmentProblem

POLL_S = 0.02
# How long neighbours may take to fail too once one rank has, so that the first to fail can be told from them.
GRACE_S = 1.0
LAST_WORDS = 400


def run_ranks(arguments: Sequence[str], ranks: int, folder: Path, timeout_s: float, threads: int = 1) -> None:
    """Run all ranks to their end, each with `threads` threads; they share `folder`, which must be empty of earlier runs.

    Raises EnvironmentProblem with the reason if one fails, or if they take longer than `timeout_s` seconds; none is left running.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            processes.append(_start(arguments, rank, ranks, folder, threads))
        _await(processes, folder, timeout_s)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()


def _start(arguments: Sequence[str], rank: int, ranks: int, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback(),
    }
    with (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *arguments, str(folder), str(rank), str(ranks)],
            stdin=subprocess.PIPE,  # closed by the system when this process dies, however it does
            stdout=log,
            stderr=log,
            env=environment,
        )


def _await(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        if time.monotonic() > deadline:
            raise EnvironmentProblem(
                f"{len(processes)} ranks were not done after {timeout_s:g} s and were stopped",
                "give them more time, or fewer documents",
            )
        time.sleep(POLL_S)
    if any(process.returncode for process in processes):
        grace = time.monotonic() + GRACE_S
        while time.monotonic() < grace and any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
        rank, reason = _first_failure(processes, folder)
        raise EnvironmentProblem(f"rank {rank} of {len(processes)} failed: {reason}", "mend the cause and run it again")


def _first_failure(processes: Sequence[subprocess.Popen[bytes]], folder: Path) -> tuple[int, str]:
    """(rank, reason) of the one to blame: a killed one could not write a reason; of the others the earliest."""
    failed = [(rank, process.poll() or 0) for rank, process in enumerate(processes) if process.poll()]
    for rank, code in failed:
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            hint = " (the system does that where memory runs out)" if -code == signal.SIGKILL else ""
            return rank, f"it was ended by {name}{hint}"
    reasons = {rank: _reason(folder / f"rank{rank}.reason") for rank, _ in failed}
    told = sorted((found[0], rank, found[1]) for rank, found in reasons.items() if found is not None)
    if told:
        return told[0][1], told[0][2]
    rank, code = failed[0]
    words = (folder / f"rank{rank}.log").read_bytes()[-LAST_WORDS:].decode("utf8", "replace").strip()
    return rank, f"exit status {code}: {words}"


def _reason(file: Path) -> tuple[int, str] | None:
    try:
        at, _, text = file.read_text("utf8").partition("\n")
        return int(at), text
    except (OSError, ValueError):
        return None


def loopback() -> str:
    """Name of the loopback interface: lo, or lo0."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def as_rank(work: Callable[[Path, int, int], None]) -> None:
    """What a rank's program calls: `work(folder, rank, ranks)`, the last three arguments of the command line.

    A failure is written down with its time and ends the process at once, before neighbours can notice. Nobody leaves before all are
    done, because a closed connection fails a neighbour's last exchange.
    """
    folder, rank, ranks = Path(sys.argv[-3]), int(sys.argv[-2]), int(sys.argv[-1])
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    try:
        work(folder, rank, ranks)
    except BaseException as error:
        text = " ".join(str(error).split()) or "no message"
        temporary = folder / f"rank{rank}.reason.tmp"
        temporary.write_text(f"{time.time_ns()}\n{type(error).__name__}: {text}", "utf8")
        temporary.replace(folder / f"rank{rank}.reason")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    (folder / f"rank{rank}.done").touch()
    while not all((folder / f"rank{other}.done").exists() for other in range(ranks)):
        time.sleep(POLL_S)
    sys.stderr.flush()
    os._exit(0)


def _end_with_launcher() -> None:
    sys.stdin.buffer.read()
    os._exit(1)
