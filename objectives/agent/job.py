"""The program of one job of an agent: an order on standard input, measurements on standard output, as JSON.

A process of its own, so that a job can be cancelled, a hostile file costs one job, and the agent stays a few megabytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from paretune.common.errors import Infeasible, ParetuneError
from paretune.engines.process.child import OUT_OF_MEMORY
from paretune.hardware_profiles.detect import fingerprint, package_version
from paretune.hardware_profiles.lock import MachineLock
from paretune.objectives.agent.onnx_files import external_locations
from paretune.objectives.agent.order import Order
from paretune.objectives.latency.benchmark import LatencyBenchmark, LatencyResult
from paretune.objectives.latency.nominal import kept_in
from paretune.objectives.latency.power import energy_counter
from paretune.objectives.latency.workload import Workload

MODEL, REFERENCE = "model.onnx", "reference.onnx"
CPU_PROVIDER = "CPUExecutionProvider"


def require_own_files(model: Path, allowed: set[str]) -> None:
    """Raises Infeasible for a model that is none, or that names files other than `allowed` for its weights."""
    try:
        named = external_locations(model)
    except ValueError as error:
        raise Infeasible(f"the model is no ONNX file: {error}", "") from None
    if named - allowed:
        raise Infeasible(
            f"a model's weights are inside it or in the file sent with it, but it names {sorted(named - allowed)[0]!r:.200}",
            "",
        )


def fingerprint_of(order: Order) -> str:
    """12 hex digits over this machine and the order's engine; that of the machine alone for ONNX Runtime on the CPU, as everywhere."""
    machine = fingerprint()
    if (order.engine, order.provider) == ("onnxruntime", CPU_PROVIDER):
        return machine
    parts = (machine, order.engine, package_version(order.engine), order.provider)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def measure(order: Order, folder: Path, kept: Path) -> LatencyResult:
    """Run the latency benchmark on the files in `folder`; the reference's own figures are kept in the folder `kept`."""
    require_own_files(folder / MODEL, {order.data_name} - {""})
    require_own_files(folder / REFERENCE, set())
    machine = fingerprint_of(order)
    nominal = kept / f"nominal-{order.reference[:16]}-{fingerprint()}-t{order.threads}.json"
    on_cpu = order.provider == CPU_PROVIDER
    benchmark = LatencyBenchmark(
        folder / REFERENCE,
        order.threads,
        machine,
        MachineLock(),
        kept_in(nominal),
        order.engine,
        order.provider,
        lambda: energy_counter("cpu" if on_cpu else "gpu"),
        Workload(order.prompt, order.new_tokens),
    )
    if order.visits == "full":
        return benchmark.measure(folder / MODEL, order.within)
    with benchmark.pair() as pair:
        return benchmark.quick(folder / MODEL, pair)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to {"order", "folder", "kept"}; what the model or the machine is to blame for is an answer too."""
    try:
        found = measure(Order.from_dict(request["order"]), Path(request["folder"]), Path(request["kept"]))
    except ParetuneError as error:
        kind = "infeasible" if isinstance(error, Infeasible) else "problem"
        return {"ok": False, "kind": kind, "problem": error.problem + _limit(error.problem), "remedy": error.remedy}
    except MemoryError:
        problem = f"measuring it takes more memory than there is{_limit('MemoryError')}"
        return {"ok": False, "kind": "infeasible", "problem": problem, "remedy": ""}
    return {
        "ok": True,
        "stable": found.stable,
        "visits": found.visits,
        "flagged": found.flagged,
        "measurements": {name: m.to_dict() for name, m in found.measurements.items()},
    }


def _limit(words: str) -> str:
    """The limit that the agent has set, if an error's words are about memory."""
    most = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if most == resource.RLIM_INFINITY or not any(sign in words for sign in OUT_OF_MEMORY):
        return ""
    return f" (each process of an agent's job may allocate {most / 1e6:,.0f} MB: --max-memory)"


def main() -> None:
    """Answer the one request on standard input; end without an answer if the agent has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the agent
    request = json.loads(sys.stdin.read())
    if os.getppid() != request["parent"]:
        return  # it died before
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    answers.write(json.dumps(answer(request)))
    answers.close()


if __name__ == "__main__":
    main()
