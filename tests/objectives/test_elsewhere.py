"""A target measured by an agent: a real agent that is killed and comes back, and a search whose agent stays away."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from paretune.common.agent_access import TOKEN
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.compression.export.graph import build_model, save_model
from paretune.hardware_profiles import Profile
from paretune.hardware_profiles.detect import fingerprint
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.agent import remote as elsewhere
from paretune.objectives.agent.client import AgentClient, RemoteBenchmark
from paretune.objectives.agent.order import Order
from paretune.objectives.agent.remote import connect, remote_fingerprint
from paretune.objectives.agent.start import new_token
from paretune.objectives.agent.wire import AgentGone, Timeouts
from paretune.objectives.latency.benchmark import LatencyResult
from paretune.objectives.measurement import Measurement
from paretune.objectives.prediction.predict import predict
from paretune.search.evaluators import latency_measuring as visits
from paretune.search.evaluators.latency_measuring import LatencyMeasuring
from paretune.search.evaluators.simulated import SHAPE, decode_ms
from paretune.search.tasks.fit import Fit
from paretune.spaces import Candidate, Space
from paretune.teachers.checkpoint.teacher import Teacher
from support.decoders import decoder_design

SPACE = Space.of(SHAPE, ("fp32/fp32", "int8/int8", "int4/int8"))
HASTY = Timeouts(answer=5.0, patience=0.3, job=20.0, poll=0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Teacher) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    shape = tiny_teacher.shape
    candidate = Space.of(shape, ("fp32/fp32", "int4/int8")).baselines()[-1]
    save_model(build_model(tiny_teacher.weights(), candidate, tiny_teacher.config, shape), path)
    return path


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def agent_process(home: Path, port: int) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != TOKEN}
    command = [sys.executable, "-m", "paretune", "agent", "--home", str(home), "--port", str(port), "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr and process.stderr.read().decode()
    return process


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in path.read_text().split()]
    return found + [grandchild for child in found for grandchild in children_of(child)]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.mark.timeout(280)
def test_a_killed_agent_comes_back_and_the_measurement_is_made(tmp_path: Path, model: Path) -> None:
    """SIGKILL in the middle of a job; the one who waits orders again, and sends no file again."""
    home, port = tmp_path / "home", free_port()
    token = new_token(home)
    agent = agent_process(home, port)
    client = AgentClient(f"http://127.0.0.1:{port}", token, Timeouts(answer=20.0, patience=60.0, job=200.0, poll=0.1))
    sent: list[str] = []
    ask = client.wire.ask
    client.wire.ask = lambda method, path, *a, **k: (sent.append(method), ask(method, path, *a, **k))[1]  # type: ignore[method-assign, func-returns-value]
    results: list[LatencyResult] = []
    benchmark = RemoteBenchmark(client, model, 1)

    def measure() -> None:
        with benchmark.pair() as pair:
            results.append(benchmark.quick(model, pair))

    waiting = threading.Thread(target=measure)
    waiting.start()
    try:
        engines = until(lambda: len(found := children_of(agent.pid)) >= 3 and found)  # the job and its two engines
        os.kill(agent.pid, signal.SIGKILL)
        agent.wait()
        until(lambda: not any(lives(pid) for pid in engines), 10)
        assert waiting.is_alive() and not results
        agent.stderr and agent.stderr.close()
        agent = agent_process(home, port)
        waiting.join(200)
    finally:
        agent.terminate()
        assert agent.wait(240) == 0
    assert client.orders == 2 and sent.count("PUT") == 1, "model and reference are one file here"
    found = results[0].measurements
    assert found.keys() >= {"decode_ms_per_token", "ttft_ms"} and results[0].stable in (True, False)
    for name in ("decode_ms_per_token", "ttft_ms"):
        assert 0 < found[name].low <= found[name].value <= found[name].high
        assert found[name].fingerprint == fingerprint()
        assert found[name].provenance == ("measured" if results[0].stable else "disturbed")
    assert not any((home / "agent" / "work").iterdir())


def test_an_agent_that_makes_its_token_prints_it_once(tmp_path: Path) -> None:
    talked = []
    for _ in range(2):
        agent = agent_process(tmp_path, free_port())
        agent.send_signal(signal.SIGINT)
        talked.append(agent.communicate(timeout=120)[1].decode())
        assert agent.returncode == 0
    token = (tmp_path / "agent" / "token").read_text().strip()
    assert token in re.sub(r"\s", "", talked[0]) and token not in re.sub(r"\s", "", talked[1])


class StandIn:
    """An agent's client: answers by a law, or is away."""

    def __init__(self, machine: str = "m" * 12) -> None:
        self.machine, self.away, self.asked = machine, False, 0
        self.wire = type("Wire", (), {"url": "http://board:7411"})()
        self.law: Callable[[Path], float] = lambda _model: 1.0

    def health(self) -> dict[str, Any]:
        if self.away:
            raise AgentGone("no agent answers at http://board:7411", "start it")
        return {"fingerprint": self.machine, "profile": {"threads": 3}}

    def measure(self, model: Path, _reference: Path, order: Order) -> LatencyResult:
        self.health()
        self.asked += 1
        ms = self.law(model)
        return LatencyResult(
            {
                name: Measurement(scale * ms, "ms", scale * ms, scale * ms, "measured", 9, self.machine, order.visits)
                for name, scale in (("decode_ms_per_token", 1.0), ("ttft_ms", 10.0))
            },
            True,
        )


class Host:
    """A worker's workspace, as far as the lane sees it."""

    space = SPACE

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder, self.home, self.cache, self.lock = folder / "study", folder, folder / "cache", None
        self.folder.mkdir(exist_ok=True)
        self.profile = detected_profile().model_copy(update={"name": "board", "agent": "http://board:7411", **changes})


class ByKey(LatencyMeasuring):
    """Writes a model that only names its candidate."""

    latency: ClassVar = ("decode_ms_per_token", "ttft_ms")

    def build(self, candidate: Any, model: Path) -> None:
        model.write_text(candidate.to_json())

    def _folder(self) -> Path:
        return self._host.cache / "measurements"

    def kept_file(self, candidate: Any) -> Path:
        return self._folder() / f"{candidate.key}.json"


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    client = StandIn()
    client.law = lambda path: decode_ms(Candidate.from_dict(json.loads(path.read_text())))
    benchmark = RemoteBenchmark(client, Path("reference.onnx"), 1)  # type: ignore[arg-type]
    monkeypatch.setattr(visits, "open_benchmark", lambda _profile, _home, turn: benchmark)
    monkeypatch.setattr(
        elsewhere, "_memory_here", lambda _m, note, _turn: Measurement(9.0, "bytes", 9, 9, "predicted", note=note)
    )
    return client


def fitted(folder: Path, points: int = 30) -> tuple[ByKey, list[Candidate], Fit]:
    designed = decoder_design(SPACE, points)
    task = Fit(tuple(designed), 60.0, seconds_left=60.0)
    return ByKey(Host(folder)), designed, task  # type: ignore[arg-type]


def test_fit_and_confirmations_are_measured_at_the_agent(tmp_path: Path, board: StandIn) -> None:
    measuring, designed, task = fitted(tmp_path)
    found = measuring.fit(task).found
    assert found.missing == 0 and len(found.kept) == board.asked == len(designed)
    values = {json.dumps(k["candidate"]): k["decode_ms_per_token"] for k in found.kept}
    assert values == {json.dumps(json.loads(c.to_json())): pytest.approx(decode_ms(c)) for c in designed}
    kept = list((tmp_path / "cache" / "measurements" / f"at-{board.machine}").glob("*.json"))
    assert len(kept) == len(designed) and not list((tmp_path / "cache" / "measurements").glob("*.json"))
    again = ByKey(Host(tmp_path))  # type: ignore[arg-type]
    assert again.fit(task).result == found and board.asked == len(designed), "what is kept is not measured again"
    model = tmp_path / "model"
    again.build(designed[3], model)
    assert again.measure(designed[3], model).measurements["ttft_ms"].note == "full"


def test_a_confirmation_whose_agent_vanished_is_left_predicted_and_marked(tmp_path: Path, board: StandIn) -> None:
    measuring, designed, task = fitted(tmp_path)
    measuring.fit(task)
    unseen = next(c for c in decoder_design(SPACE, 60, seed=5) if c not in designed)
    measuring.build(unseen, tmp_path / "model")
    board.away = True
    for worker in (measuring, ByKey(Host(tmp_path))):  # type: ignore[arg-type]  # one that never reached it, too
        result = worker.measure(unseen, tmp_path / "model")
        assert not result.stable and result.measurements.keys() == {
            "decode_ms_per_token",
            "ttft_ms",
            "peak_memory_bytes",
        }
        for m in result.measurements.values():
            assert m.is_left_predicted and "no agent answers at http://board:7411" in m.note
        assert result.measurements["decode_ms_per_token"].value == pytest.approx(decode_ms(unseen), rel=0.02)
        assert "30 measurements there" in result.measurements["ttft_ms"].note
    assert len(measuring.all_kept()) == len(designed), "what is predicted is not kept as measured"
    board.away = False
    result = measuring.measure(unseen, tmp_path / "model")
    assert result.stable and not result.measurements["ttft_ms"].is_left_predicted
    assert result.measurements["ttft_ms"].provenance == "measured" and len(measuring.all_kept()) == len(designed) + 1


def test_without_measurements_of_the_agent_nothing_is_predicted(tmp_path: Path, board: StandIn) -> None:
    measuring, designed, task = fitted(tmp_path)
    board.away = True
    with pytest.raises(AgentGone):
        measuring.fit(task)
    board.away = False
    measuring, designed, task = fitted(tmp_path, points=4)
    measuring.fit(task)
    board.away = True
    measuring.build(designed[0], tmp_path / "model")
    with pytest.raises(AgentGone):
        measuring.measure(designed[0], tmp_path / "model")


def test_without_measurements_the_roofline_of_a_profile_with_figures_stands_in(tmp_path: Path, board: StandIn) -> None:
    figures = {"bandwidth_gb_per_s": 20.0, "peak_fp32_tflops": 0.1}
    measuring = ByKey(Host(tmp_path, **figures))  # type: ignore[arg-type]
    measuring.benchmark()
    assert measuring._kept_at(tmp_path / "x")
    board.away = True
    candidate = SPACE.baselines()[0]
    found = measuring.measure(candidate, tmp_path / "model").measurements
    wanted = predict(measuring._host.profile, candidate, SHAPE)
    assert found.keys() == wanted.keys()
    for name, m in found.items():
        assert m.is_left_predicted and m.value == wanted[name].value and m.note.endswith(wanted[name].note)


def test_another_machine_behind_the_url_is_refused(tmp_path: Path, board: StandIn) -> None:
    benchmark = RemoteBenchmark(board, Path("reference.onnx"), 1)  # type: ignore[arg-type]
    assert remote_fingerprint(benchmark, tmp_path) == remote_fingerprint(benchmark, tmp_path) == board.machine
    board.away = True
    assert remote_fingerprint(benchmark, tmp_path) == board.machine
    board.away, board.machine = False, "another"
    with pytest.raises(EnvironmentProblem, match="another machine or engine version"):
        remote_fingerprint(benchmark, tmp_path)


def test_a_profile_without_agent_asks_nobody(tmp_path: Path, board: StandIn) -> None:
    board.away = True
    measuring = ByKey(Host(tmp_path, agent=None))  # type: ignore[arg-type]
    candidate = SPACE.baselines()[0]
    assert measuring._kept_at(measuring.kept_file(candidate)) == measuring.kept_file(candidate)
    assert not (tmp_path / "study" / "agent.json").exists()


@pytest.mark.parametrize(
    "url", ["board:7411", "http://user:secret@board:7411", "http://board", "http://board:7411/x", "file:///etc"]
)
def test_a_profile_names_an_agent_by_a_plain_url(url: str) -> None:
    data = detected_profile().model_dump()
    assert Profile.model_validate({**data, "agent": "http://board.lan:7411"}).agent
    assert Profile.model_validate(data).agent is None
    with pytest.raises(ValueError, match="agent"):
        Profile.model_validate({**data, "agent": url})


def test_an_agent_without_a_token_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    with pytest.raises(UsageError, match="wants its token, but there is none here"):
        connect("http://board:7411", tmp_path)
    monkeypatch.setenv(TOKEN, "t" * 20)
    assert connect("http://board:7411/", tmp_path).wire.token == "t" * 20


def test_measure_takes_threads_from_the_agents_profile(
    tmp_path: Path, board: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = type("Here", (), {"reference": Path("reference.onnx")})()
    monkeypatch.setattr(elsewhere, "open_local_benchmark", lambda *_: here)
    monkeypatch.setattr(elsewhere, "connect", lambda _url, _home: board)
    local = detected_profile()
    assert elsewhere.open_benchmark(local, tmp_path) is here
    assert elsewhere.open_benchmark(local, tmp_path, "http://board:7411") == RemoteBenchmark(board, here.reference, 3)  # type: ignore[arg-type]
    named = local.model_copy(update={"name": "board", "threads": 2, "agent": "http://board:7411"})
    assert elsewhere.open_benchmark(named, tmp_path) == RemoteBenchmark(board, here.reference, 2)  # type: ignore[arg-type]


def test_ray_does_not_show_the_token() -> None:
    """Ray lists the environment of its workers to everyone who can reach it; workers of this machine inherit it anyway."""
    from paretune.search.execution.ray_executor import passed_on

    environment = {TOKEN: "secret", "PARETUNE_HOME": "h", "OMP_NUM_THREADS": "1", "OTHER": "x"}
    assert passed_on(environment) == {"PARETUNE_HOME": "h", "OMP_NUM_THREADS": "1"}
