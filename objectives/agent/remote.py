"""A target at another machine: its latency benchmark through an agent, and what is said of a candidate when the agent stays away."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paretune.common.agent_access import TOKEN, given_token
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.files import read_kept, write_atomically
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import LOCAL, Profile
from paretune.objectives.agent.client import AgentClient, RemoteBenchmark
from paretune.objectives.agent.wire import AgentGone
from paretune.objectives.latency.benchmark import LatencyBenchmark
from paretune.objectives.latency.reference import open_local_benchmark
from paretune.objectives.latency.workload import STANDARD, Workload, load_and_warm
from paretune.objectives.measurement import LEFT_PREDICTED, Measurement
from paretune.objectives.metric_names import FORWARD
from paretune.objectives.prediction.latency_fit import LatencyFit
from paretune.objectives.prediction.predict import predict
from paretune.spaces.candidate import Candidate, Shape
from paretune.spaces.kinds import AnyCandidate, AnyShape, candidate_from_dict

LEAST_POINTS = 5
UNITS = {"decode_ms_per_token": "ms/token", "ttft_ms": "ms", FORWARD: "ms"}


def connect(url: str, home: Path) -> AgentClient:
    """A client with the token of this home. Raises UsageError where there is none."""
    server = url.rstrip("/").rpartition("//")[2].replace(":", "_")
    token = given_token(home, server)
    if token is None:
        raise UsageError(
            f"the agent at {url} wants its token, but there is none here",
            f"set {TOKEN}, or put the token into {home / 'agent' / f'{server}.token'} (chmod 600)",
        )
    return AgentClient(url, token)


def open_benchmark(
    profile: Profile, home: Path, url: str | None = None, turn: Workload = STANDARD
) -> LatencyBenchmark | RemoteBenchmark:
    """The latency benchmark of `profile`: here, or at the agent of `url` or of the profile.

    With a `url` and this machine's own profile the agent's says how many threads are timed. `turn` is what candidates are timed
    with. Raises AgentGone, UsageError.
    """
    here = open_local_benchmark(home / "cache", profile, MachineLock(), turn)
    address = url or profile.agent
    if address is None:
        return here
    client = connect(address, home)
    threads = profile.threads
    if profile.name == LOCAL:
        threads = int(client.health().get("profile", {}).get("threads", 1))
    return RemoteBenchmark(client, here.reference, threads, profile.engine, profile.execution_provider, turn)


def remote_fingerprint(benchmark: RemoteBenchmark, folder: Path) -> str:
    """The fingerprint of the agent's machine; while the agent is away, the one that this study has met.

    Raises EnvironmentProblem if it is another one than this study has met: a latency fit over two machines is none.
    """
    known = read_kept(folder / "agent.json")
    try:
        told = benchmark.client.health()
        found = str(told["fingerprint"])
        if benchmark.engine != "onnxruntime":  # whose version is in the fingerprint
            version = told.get("versions", {}).get(benchmark.engine)
            found = hashlib.sha256(f"{found}{benchmark.engine}{version}".encode()).hexdigest()[:12]
    except AgentGone:
        if known is None:
            raise
        return str(known["fingerprint"])
    if known is None:
        write_atomically(
            folder / "agent.json", json.dumps({"fingerprint": found, "url": benchmark.client.wire.url}).encode()
        )
    elif known["fingerprint"] != found:
        raise EnvironmentProblem(
            f"the agent at {benchmark.client.wire.url} is another machine or engine version ({found}) than this study has "
            f"measured ({known['fingerprint']})",
            "start the agent on the first one again, or search again with another --study name",
        )
    return found


def predicted_instead(
    profile: Profile,
    candidate: AnyCandidate,
    model: Path,
    shape: AnyShape,
    points: Sequence[dict[str, Any]],
    names: Sequence[str],
    reason: AgentGone,
    turn: Workload = STANDARD,
) -> dict[str, Measurement]:
    """Latencies by a fit to what the agent had measured before it went, and the memory that the model takes here, marked so.

    `points`: {"candidate", and milliseconds by name}. Where they are fewer than LEAST_POINTS, the roofline of a profile that
    has the figures; without them `reason` is raised.
    """
    note = f"{LEFT_PREDICTED}{reason.problem}"
    if len(points) < LEAST_POINTS:
        if not (profile.can_predict and isinstance(candidate, Candidate) and isinstance(shape, Shape)):
            raise reason
        roofline = predict(profile, candidate, shape, prompt=turn.prompt, context=turn.prompt)
        return {name: replace(m, note=f"{note}; {m.note}") for name, m in roofline.items()}
    known = [(candidate_from_dict(p["candidate"]), p) for p in points]
    found = {}
    for name in names:
        fit = LatencyFit(name, UNITS[name], shape, [(c, float(p[name])) for c, p in known])
        found[name] = replace(
            fit.predict(candidate),
            note=f"{note}; by a fit to {len(points)} measurements there, error {fit.error.median:.1%}",
        )
    return {**found, "peak_memory_bytes": _memory_here(model, note, turn)}


def _memory_here(model: Path, note: str, turn: Workload) -> Measurement:
    with EngineChild(1) as child:
        empty = float(child.ask(do="memory")["peak_bytes"])
        load_and_warm(child, model, 1, turn=turn)
        peak = float(child.ask(do="memory")["peak_bytes"]) - empty
    return Measurement(
        peak, "bytes", peak, peak, "predicted", 1, "", f"{note}; as the engine takes on the searching machine"
    )
