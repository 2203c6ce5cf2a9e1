"""Measuring on another machine, as if its latency benchmark ran here.

An agent may be killed and come back at any time: what was uploaded is still there, the job is not, so the order is placed
again, up to a cap. One that stays away is `AgentGone`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from paretune.common.errors import EnvironmentProblem, Infeasible, UsageError
from paretune.objectives.agent.order import Order
from paretune.objectives.agent.wire import AgentGone, Answer, Timeouts, Wire
from paretune.objectives.latency.benchmark import LatencyResult
from paretune.objectives.latency.workload import STANDARD, Workload
from paretune.objectives.measurement import Measurement, Provenance

ATTEMPTS = 3


class AgentClient:
    """An agent at `url`. `orders` counts how often a measurement was ordered, repetitions included."""

    def __init__(self, url: str, token: str, timeouts: Timeouts | None = None) -> None:
        self.timeouts = timeouts or Timeouts()
        self.wire = Wire(url, token, self.timeouts)
        self.orders = 0
        self._digests: dict[tuple[str, int, int, int], str] = {}

    def health(self) -> dict[str, Any]:
        """Profile, engine, versions, fingerprint, whether it is busy. Raises AgentGone, UsageError."""
        answer = self.wire.ask("GET", "/v1/health")
        told = answer.told
        if (
            answer.status != 200
            or told.get("service") != "paretune-agent"
            or not isinstance(told.get("fingerprint"), str)
        ):
            raise UsageError(f"what listens at {self.wire.url} is no paretune agent", "name the URL that it printed")
        return told

    def upload(self, path: Path) -> str:
        """Have a file at the agent, sent only if it is not there yet; returns its SHA-256."""
        digest = self._digest(path)
        if self.wire.ask("HEAD", f"/v1/artifacts/{digest}").status != 200:
            answer = self.wire.ask("PUT", f"/v1/artifacts/{digest}", file=path)
            if answer.status != 200:
                raise _refused(answer, f"it does not take {path.name} ({path.stat().st_size:,} bytes)")
        return digest

    def measure(self, model: Path, reference: Path, order: Order) -> LatencyResult:
        """Measure `model` against `reference`; `order` says how (its digests are filled in here).

        Raises Infeasible if the engine refuses the model, AgentGone if the agent stays away or has died ATTEMPTS times,
        EnvironmentProblem if it cannot measure.
        """
        for _ in range(ATTEMPTS):
            self.orders += 1
            name = self._place(model, reference, replace(order, key=uuid.uuid4().hex))
            if name is None:
                continue
            answer = self._wait(name)
            if answer is not None:
                return _result(answer, self.wire.url)
        raise AgentGone(
            f"the agent at {self.wire.url} has lost the measurement {ATTEMPTS} times",
            "look there why it ends, then run the same command again",
        )

    def _place(self, model: Path, reference: Path, order: Order) -> str | None:
        """Upload and order; the job's id, or None if the agent has let go of a file meanwhile."""
        data = model.with_name(f"{model.name}.data")
        found = replace(order, model=self.upload(model), reference=self.upload(reference))
        if data.exists():
            found = replace(found, data=self.upload(data), data_name=data.name)
        answer = self.wire.ask("POST", "/v1/measurements", found.to_dict())
        if answer.status == 409:
            return None
        if answer.status != 202 or not isinstance(answer.told.get("id"), str):
            raise _refused(answer, "it does not take the order")
        return str(answer.told["id"])

    def _wait(self, name: str) -> dict[str, Any] | None:
        """What became of a job; None if the agent no longer knows it. A job that takes too long is cancelled."""
        deadline = time.monotonic() + self.timeouts.job
        with self._cancelled_on_error(name):
            while True:
                answer = self.wire.ask("GET", f"/v1/measurements/{name}")
                if answer.status == 404:
                    return None
                if answer.status != 200:
                    raise _refused(answer, "it does not say what became of the measurement")
                if answer.told.get("state") in ("done", "failed"):
                    return answer.told
                if time.monotonic() > deadline:
                    raise AgentGone(
                        f"the agent at {self.wire.url} has not measured within {self.timeouts.job:.0f} s",
                        "see what keeps that machine busy",
                    )
                time.sleep(self.timeouts.poll)

    @contextlib.contextmanager
    def _cancelled_on_error(self, name: str) -> Iterator[None]:
        """Do not leave a job behind that nobody waits for, as far as the agent can be reached at once."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                hasty = Wire(self.wire.url, self.wire.token, replace(self.timeouts, answer=2.0, patience=0.0))
                hasty.ask("DELETE", f"/v1/measurements/{name}")
            raise

    def _digest(self, path: Path) -> str:
        stat = path.stat()
        key = (str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if key not in self._digests:
            with path.open("rb") as stream:
                self._digests = {**self._digests, key: hashlib.file_digest(stream, "sha256").hexdigest()}
        return self._digests[key]


@dataclass(frozen=True)
class RemoteBenchmark:
    """A latency benchmark on another machine: the agent measures there, against a reference that is sent along."""

    client: AgentClient
    reference: Path
    threads: int
    engine: str = "onnxruntime"
    provider: str = "CPUExecutionProvider"
    turn: Workload = STANDARD

    @contextlib.contextmanager
    def pair(self) -> Iterator[RemoteBenchmark]:
        """The agent makes its own pairs."""
        yield self

    def measure(self, model: Path, within: float | None = None) -> LatencyResult:
        """Let the agent measure `model` over several visits, and load time and memory.

        `within` is the half-width of the 95 % intervals to reach, as a fraction. Raises as `AgentClient.measure`.
        """
        return self.client.measure(model, self.reference, replace(self._order("full"), within=within))

    def quick(self, model: Path, _pair: Any) -> LatencyResult:
        """Let the agent measure `model` in one visit, with a pair of its own. Raises as `AgentClient.measure`."""
        return self.client.measure(model, self.reference, self._order("one"))

    def _order(self, visits: str) -> Order:
        nothing = "0" * 64
        return Order(
            "new",
            nothing,
            nothing,
            self.threads,
            visits,
            engine=self.engine,
            provider=self.provider,
            prompt=self.turn.prompt,
            new_tokens=self.turn.tokens,
        )


def _refused(answer: Answer, what: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the agent refuses, {what}: {answer.told.get('error', answer.status)}", "mend that there"
    )


def _result(told: dict[str, Any], url: str) -> LatencyResult:
    """Result of a remote latency benchmark. Raises what was raised there, or EnvironmentProblem for figures that are none."""
    if told["state"] == "failed":
        error = told.get("error") or {}
        problem, remedy = str(error.get("problem", "no reason given")), str(error.get("remedy", ""))
        if error.get("kind") == "infeasible":
            raise Infeasible(problem, remedy)
        raise EnvironmentProblem(f"the agent at {url} could not measure: {problem}", remedy or "look at that machine")
    try:
        found = {str(name): _measurement(data) for name, data in told["measurements"].items()}
        return LatencyResult(found, bool(told["stable"]), int(told.get("visits", 1)), int(told.get("flagged", 0)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EnvironmentProblem(
            f"the agent at {url} answers with figures that are none: {error}", "run the same version of paretune there"
        ) from None


def _measurement(data: dict[str, Any]) -> Measurement:
    found = Measurement.from_dict(data)
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in (found.value, found.low, found.high)):
        raise ValueError(f"a value must be finite, but got {data!r:.200}")
    if found.provenance not in get_args(Provenance):
        raise ValueError(
            f"provenance must be one of {', '.join(get_args(Provenance))}, but got {found.provenance!r:.50}"
        )
    return found
