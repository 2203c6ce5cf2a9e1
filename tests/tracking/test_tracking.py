"""Charts, report and MLflow over a synthetic study: nothing is trained or measured, the numbers are made up."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.hardware_profiles.lock import MachineLock
from paretune.objectives.measurement import Measurement
from paretune.search.study.store import Store
from paretune.search.study.target_view import view_on
from paretune.search.study.view import Point, StudyView, load_view
from paretune.service.server.mlflow_ui import serve_ui
from paretune.spaces.candidate import Candidate, Layer, Pattern
from paretune.tracking.charts.front import front_figure
from paretune.tracking.charts.front_picture import front_png
from paretune.tracking.charts.points import AXES, groups, staircase, window
from paretune.tracking.mlflow import housekeeper as housekeeper_module
from paretune.tracking.mlflow.addresses import end_server, start_page
from paretune.tracking.mlflow.experiment import CHOICES, EXPERIMENT, VIEW_TAG, VIEWS
from paretune.tracking.mlflow.housekeeper import Housekeeper
from paretune.tracking.mlflow.paths import database_uri
from paretune.tracking.mlflow.registry import alias_of, model_name
from paretune.tracking.mlflow.sink import MlflowSink, rebuild, tracking_uri, try_drain
from paretune.tracking.mlflow.texts import candidate_params, run_names, study_params
from paretune.tracking.report.page import flat
from paretune.tracking.report.report import report_html, write_report
from paretune.tracking.wording import recommended
from support.decoders import decoder
from support.studies import CONFIRMED, EVIL, INT4, INT8, add_board, candidate, confirm, fill, new_study, score_rung0
from support.waiting import wait


@dataclasses.dataclass
class Recorded:
    """A study that was published once, with MLflow's client."""

    home: Path
    store: Store
    client: Any

    @property
    def view(self) -> StudyView:
        return load_view(self.store)

    def runs(self) -> list[Any]:
        found = self.client.search_runs([self.client.get_experiment_by_name(EXPERIMENT).experiment_id])
        return [run for run in found if run.data.tags["paretune.study"] == self.store.folder.name]

    def children(self) -> dict[str, Any]:
        return {
            run.data.tags["paretune.candidate"]: run for run in self.runs() if "paretune.candidate" in run.data.tags
        }

    @property
    def parent(self) -> Any:
        return next(run for run in self.runs() if run.data.tags["kind"] == "study")


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudyView]:
    store = new_study(tmp_path_factory.mktemp("home") / "studies" / "night")
    fill(store)
    yield load_view(store)
    store.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    home = tmp_path_factory.mktemp("recorded home")
    store = new_study(home / "studies" / "night")
    fill(store)
    assert MlflowSink(home).drain(store, load_view(store)) == CONFIRMED
    from mlflow import MlflowClient

    yield Recorded(home, store, MlflowClient(tracking_uri(home), tracking_uri(home)))
    store.close()


def page_without_plotly(text: str) -> str:
    from plotly.offline import get_plotlyjs

    assert text.count(get_plotlyjs()) == 1, "plotly.js is inlined exactly once"
    return text.replace(get_plotlyjs(), "")


def test_report_loads_nothing_and_escapes_everything(view: StudyView) -> None:
    page = page_without_plotly(report_html(view))
    assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//|@import|url\(""", page)
    assert "default-src 'none'" in page
    assert '"showSendToCloud": false' in page, "plotly.js offers an upload to its maker's cloud otherwise"
    assert EVIL not in page
    assert page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;") >= 3, "command, failure and event"
    # Every script element is one of ours: three of the chart and the theme, none out of the data.
    assert not re.search(r"<script[^>]*>\s*alert", page)


def test_report_says_what_a_reader_needs(view: StudyView) -> None:
    page = page_without_plotly(report_html(view))
    chosen = recommended(view)
    assert chosen is not None
    assert f"★ Recommended: {chosen.chosen.name} <code>{chosen.chosen.key[:8]}" in page
    for point in view.front:
        assert point.key[:8] in page and f"artifacts/{point.key}" in page
    for wanted in (
        "teacher fp32",
        "disturbed: decode per token, TTFT; the rest measured",
        "tied with",
        "limits.loss",
        "decode_ms_per_token.median",
        "paretune search",
        "elastic",
        "30</b><span>scored at rung 0 (estimates) of 1.2e+09 possible",
        "1 h 12 min",
        "2.13.0",
    ):
        assert wanted in page, wanted


def test_empty_study_has_a_report_and_a_picture(tmp_path: Path) -> None:
    store = new_study(tmp_path / "studies" / "empty")
    write_report(load_view(store))
    page = page_without_plotly((store.folder / "report.html").read_text())
    assert "No recommendation yet" in page and "None is confirmed yet" in page and "Nothing is scored yet" in page
    assert png_size(store.folder / "front.png") == (1200, 800)
    assert not list(store.folder.glob(".*.tmp"))
    store.close()


def test_meta_of_a_bare_study_may_be_missing(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "bare", {})
    score_rung0(store, candidate(3, 512, INT8), 2.3, 0.2, 4.0)
    assert "No recommendation yet" in report_html(load_view(store))
    store.close()


def png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header, after checking signature and end."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_png_is_a_picture_with_colours(view: StudyView, tmp_path: Path) -> None:
    import matplotlib.image

    front_png(view, tmp_path / "front.png")
    assert png_size(tmp_path / "front.png") == (1200, 800)
    pixels = matplotlib.image.imread(tmp_path / "front.png")[..., :3]
    coloured = (pixels.max(-1) - pixels.min(-1)) > 0.25
    assert 0.005 < coloured.mean() < 0.3


def test_every_point_is_drawn_once(view: StudyView) -> None:
    counts = {group.name: len(group.points) for group in groups(view)}
    assert sum(counts.values()) == len(view.rung0) + len(view.confirmed)
    assert (
        counts["estimated (rung 0)"] == 30
        and counts["teacher, unchanged"] == 3
        and counts["disturbed, not ranked"] == 1
    )
    assert counts["front, tied"] == 1 and len(view.ties) == 1
    drawn = {p.key for group in groups(view) if group.name.startswith("front") for p in group.points}
    assert drawn == {p.key for p in view.front if p.source != "baseline"}


def test_axis_menu_moves_every_trace(view: StudyView) -> None:
    figure = front_figure(view)
    buttons = figure.layout.updatemenus[0].buttons
    assert len(buttons) == len(AXES)
    for button in buttons:
        data, layout = button.args
        assert all(len(column) == len(figure.data) for column in data.values())
        assert layout["xaxis.title.text"] and layout["yaxis.title.text"]
    memory = buttons[AXES.index(("peak_memory_bytes", "nll"))].args[0]
    names = [trace.name for trace in figure.data]
    estimated = next(i for i, name in enumerate(names) if name.startswith("estimated"))
    assert set(memory["x"][estimated]) == {None}, "rung 0 knows no peak memory"
    front = next(i for i, name in enumerate(names) if name.startswith("front ("))
    assert all(value > 0 for value in memory["x"][front])
    json.loads(figure.to_json())


def test_error_bars_are_the_intervals(view: StudyView) -> None:
    trace = next(t for t in front_figure(view).data if t.name.startswith("front ("))
    points = next(g for g in groups(view) if g.name == "front").points
    for i, point in enumerate(points):
        m, increase = point.measurements["nll"], point.measurements["nll_increase"]
        assert trace.error_y.array[i] == pytest.approx(increase.high - increase.value), (
            "the NLL's bar is the paired one"
        )
        assert trace.error_y.arrayminus[i] == pytest.approx(increase.value - increase.low)
        assert trace.y[i] == m.value


def test_staircase_only_descends(view: StudyView) -> None:
    for x, y in AXES:
        corners = staircase(view, x, y)
        assert corners and all(b[0] > a[0] and b[1] < a[1] for a, b in itertools.pairwise(corners))


def test_one_hopeless_estimate_does_not_flatten_the_front(view: StudyView) -> None:
    bad = dataclasses.replace(
        view.rung0[0],
        measurements=view.rung0[0].measurements
        | {"estimated_nll": Measurement(50.0, "nats/token", 40.0, 60.0, "predicted")},
    )
    shown = window(dataclasses.replace(view, rung0=(*view.rung0, bad)), "nll")
    assert shown is not None and shown[1] < 5.0 and shown[0] < min(p.measurements["nll"].value for p in view.front)


def test_flat_settings() -> None:
    assert flat({"a": {"b": 1.23456, "c": [1, True]}, "d": None}) == [("a.b", "1.235"), ("a.c", "1, yes"), ("d", "–")]
    assert flat(None) == []


def test_drain_records_parent_and_children(recorded: Recorded) -> None:
    view, children, parent = recorded.view, recorded.children(), recorded.parent
    assert set(children) == {p.key for p in view.confirmed}
    assert recorded.store.outbox() == []
    assert parent.info.status == "RUNNING" and parent.data.params["spec.limits.loss"] == "0.1"
    assert parent.data.params["version.torch"] == "2.13.0" and "Recommended" in parent.data.tags["mlflow.note.content"]
    files = {f.path for f in recorded.client.list_artifacts(parent.info.run_id)}
    assert {"front.html", "front.png", "report.html", "rung0.json"} <= files
    table = json.loads((local(parent) / "rung0.json").read_text())
    assert len(table["data"]) == 30 and all(len(row) == len(table["columns"]) for row in table["data"])
    for point in view.confirmed:
        run = children[point.key]
        assert run.info.status == "FINISHED" and run.info.run_name == point.name
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["hardware"] == "local-cpu" and run.data.tags["study"] == "night"
        assert run.data.metrics["nll"] == pytest.approx(point.measurements["nll"].value, rel=1e-5)
        assert run.data.params["layers"] == str(len(decoder(point.candidate).layers))
        assert run.info.end_time - run.info.start_time == 40_000


def local(run: Any) -> Path:
    """The folder of a run's artifacts."""
    from urllib.parse import unquote, urlparse

    return Path(unquote(urlparse(run.info.artifact_uri).path))


def test_front_members_carry_their_artifact(recorded: Recorded) -> None:
    front = {p.key for p in recorded.view.front}
    for key, run in recorded.children().items():
        assert run.data.tags["pareto"] == ("true" if key in front else "false")
        assert (local(run) / "artifact" / "onnx" / "model.onnx").is_file() == (key in front)
        assert local(run).is_relative_to(recorded.home / "artifacts")


def test_alias_points_at_the_recommended(recorded: Recorded) -> None:
    # The youngest study has the alias, and others of these tests may be younger.
    with contextlib.suppress(MlflowException):
        recorded.client.delete_registered_model_alias("student-stdlib-coder", "local-cpu")
    recorded.store.refill_outbox()
    assert try_drain(recorded.home, recorded.store, recorded.view) is None
    chosen = recommended(recorded.view)
    assert chosen is not None
    starred = [key for key, run in recorded.children().items() if run.data.tags["recommended"] == "true"]
    assert starred == [chosen.chosen.key]
    version = recorded.client.get_model_version_by_alias("student-stdlib-coder", "local-cpu")
    assert version.run_id == recorded.children()[chosen.chosen.key].info.run_id
    assert version.source.endswith("/artifact") and version.tags["paretune.candidate"] == chosen.chosen.key


def test_the_study_shows_the_figures_of_its_answer(recorded: Recorded) -> None:
    """Studies compare by the candidate that each recommends, under the names that candidates have."""
    chosen = recommended(recorded.view)
    assert chosen is not None
    figures = recorded.parent.data.metrics
    assert figures["nll"] == pytest.approx(chosen.chosen.measurements["nll"].value, rel=1e-5)
    assert figures["confirmed"] == CONFIRMED and figures["explored"] == 30
    assert figures["front_members"] == len(recorded.view.front)
    first = recorded.parent.data.tags["mlflow.note.content"].splitlines()[0]
    assert first.startswith(f"**Recommended: {chosen.chosen.name}**")


def test_choices_are_numbers_and_names_differ(recorded: Recorded) -> None:
    children = recorded.children()
    for key, run in children.items():
        for name in (*CHOICES, "n_kv_heads"):
            float(run.data.params[name])
        assert key in recorded.children() and run.data.tags["kind"] == "candidate"
    point = recorded.view.front[0]
    twice = dataclasses.replace(recorded.view, confirmed=(point, dataclasses.replace(point, key="beef" * 4)))
    assert list(run_names(twice).values()) == [point.name, f"{point.name} (beef)"]


def test_means_are_over_layers() -> None:
    """A mixed candidate, by hand: half the layers of 512 in int8, half of 256 in int4, a third sparse."""
    wide, narrow = (
        Layer(512, 4, INT8, INT8, Pattern()),
        Layer(256, 2, INT4, INT4, Pattern("unstructured", 0.5, "wanda")),
    )
    mixed = Candidate((wide, narrow), INT8, INT8)
    point = Point("k", 0, "sampler", mixed, "confirmed", {}, {}, None)
    found = candidate_params(point)
    assert [found[name] for name in ("layers", "ffn_width", "n_kv_heads", "bits", "sparsity")] == [
        "2",
        "384",
        "3",
        "6",
        "0.25",
    ]
    assert found["precision_ffn"] == "int8/int4" and found["sparsity_pattern"] == "none/unstructured"


def test_the_experiment_has_its_views_once(recorded: Recorded) -> None:
    """Each view's filter finds runs. A view that a user deleted stays away."""
    experiment = recorded.client.get_experiment_by_name(EXPERIMENT)
    for view in VIEWS:
        saved = json.loads(experiment.tags[VIEW_TAG + view.key])
        assert saved["name"] == view.name and json.loads(saved["state"])["searchFilter"] == view.condition
        assert recorded.client.search_runs([experiment.experiment_id], view.condition)
    recorded.client.delete_experiment_tag(experiment.experiment_id, VIEW_TAG + VIEWS[0].key)
    assert try_drain(recorded.home, recorded.store, recorded.view) is None
    assert VIEW_TAG + VIEWS[0].key not in recorded.client.get_experiment_by_name(EXPERIMENT).tags


def test_a_second_drain_and_a_rebuild_repeat_nothing(recorded: Recorded) -> None:
    def versions() -> set[str]:
        found = recorded.client.search_model_versions("name = 'student-stdlib-coder'")
        return {version.version for version in found if version.tags["study"] == recorded.store.folder.name}

    before, versions_before = {run.info.run_id for run in recorded.runs()}, versions()
    key = recorded.view.front[0].key
    assert MlflowSink(recorded.home).drain(recorded.store, recorded.view) == 0
    recorded.store.refill_outbox()
    assert MlflowSink(recorded.home).drain(recorded.store, recorded.view) == CONFIRMED
    assert {run.info.run_id for run in recorded.runs()} == before
    assert versions() == versions_before and versions_before
    history = recorded.client.get_metric_history(recorded.children()[key].info.run_id, "nll")
    assert len(history) == 1, "a repeated metric is the same row"


def test_a_crash_before_the_outbox_is_done_repeats_nothing(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {run.info.run_id for run in recorded.runs()}
    recorded.store.refill_outbox()

    def crash(self: Store, identity: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "outbox_done", crash)
        with pytest.raises(KeyboardInterrupt):
            MlflowSink(recorded.home).drain(recorded.store, recorded.view)
    assert len(recorded.store.outbox()) == CONFIRMED, "nothing counts as published"
    assert try_drain(recorded.home, recorded.store, recorded.view) is None
    assert recorded.store.outbox() == [] and {run.info.run_id for run in recorded.runs()} == before


def test_an_interrupted_drain_completes_its_child(recorded: Recorded) -> None:
    """A run that was created but not filled is found and filled, not created again."""
    point = recorded.view.front[0]
    run = recorded.children()[point.key]
    recorded.client.delete_tag(run.info.run_id, "source")
    recorded.client.update_run(run.info.run_id, status="RUNNING")
    recorded.store.refill_outbox()
    assert try_drain(recorded.home, recorded.store, recorded.view) is None
    again = recorded.children()[point.key]
    assert (
        again.info.run_id == run.info.run_id
        and again.info.status == "FINISHED"
        and again.data.tags["source"] == point.source
    )


def test_what_fails_in_mlflow_stays_in_the_outbox(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third run of a new study fails before it is complete: two are done, one repeats, none is recorded twice."""
    from mlflow import MlflowClient

    store = new_study(recorded.home / "studies" / "flaky")
    for layers in (3, 4, 5):
        confirm(store, candidate(layers, 576, INT4), 3.0 - layers / 10, 0.1 * layers, layers)
    flaky = Recorded(recorded.home, store, recorded.client)
    ended, original = [], MlflowClient.set_terminated

    def fail_third(self: Any, run_id: str, *args: Any) -> None:
        ended.append(run_id)
        if len(ended) == 3:
            raise MlflowException("the disk is full\nand more")
        original(self, run_id, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", fail_third)
        assert try_drain(recorded.home, store, flaky.view) == "MlflowException: the disk is full"
    assert [key for _, _, key in store.outbox()] == [candidate(5, 576, INT4).key]
    assert try_drain(recorded.home, store, flaky.view) is None
    assert store.outbox() == [] and len(flaky.runs()) == 4 and {r.info.run_id for r in flaky.runs()} >= set(ended)
    assert all(run.info.status == "FINISHED" for run in flaky.children().values())
    store.close()


def test_time_that_ran_out_leaves_the_rest_in_the_outbox(recorded: Recorded) -> None:
    recorded.store.refill_outbox()
    assert MlflowSink(recorded.home).drain(recorded.store, recorded.view, within_s=0.0) == 1
    assert len(recorded.store.outbox()) == CONFIRMED - 1
    assert try_drain(recorded.home, recorded.store, recorded.view) is None


def test_rebuild_needs_the_study_for_itself(recorded: Recorded) -> None:
    with pytest.raises(EnvironmentProblem, match="running on the study"):
        rebuild(recorded.home, recorded.store.folder)
    with pytest.raises(UsageError, match="no study is called"):
        rebuild(recorded.home, recorded.home / "studies" / "none")


def test_tags_status_and_alias_follow_the_front(recorded: Recorded) -> None:
    """A new candidate beats all students: their tags turn, its version gets the alias; the study's end is recorded."""
    store = new_study(recorded.home / "studies" / "second")
    loser = confirm(store, candidate(5, 576, INT4), 2.10, 0.27, 2.9)
    second = Recorded(recorded.home, store, recorded.client)
    assert MlflowSink(recorded.home).drain(store, second.view) == 1
    assert second.children()[loser].data.tags["pareto"] == "true"
    assert second.children()[loser].data.tags["recommended"] == "true"
    winner = confirm(store, candidate(4, 448, INT4), 2.05, 0.20, 2.0)
    store.set_meta(state="complete")
    assert MlflowSink(recorded.home).drain(store, second.view) == 1
    tags = {key: run.data.tags for key, run in second.children().items()}
    assert (tags[loser]["pareto"], tags[loser]["recommended"]) == ("false", "false")
    assert (tags[winner]["pareto"], tags[winner]["recommended"]) == ("true", "true")
    assert second.parent.info.status == "FINISHED"
    alias = recorded.client.get_model_version_by_alias("student-stdlib-coder", "local-cpu")
    assert alias.run_id == second.children()[winner].info.run_id
    store.set_meta(state="interrupted")
    MlflowSink(recorded.home).drain(store, second.view)
    assert second.parent.info.status == "KILLED" and len(second.runs()) == 3
    store.close()
    assert rebuild(recorded.home, store.folder) == 2
    # The older study's rebuild does not take the alias back from the younger one.
    recorded.store.refill_outbox()
    assert try_drain(recorded.home, recorded.store, recorded.view) is None
    assert recorded.client.get_model_version_by_alias("student-stdlib-coder", "local-cpu").run_id == alias.run_id


def test_names_that_mlflow_reserves() -> None:
    assert [alias_of(name) for name in ("local-cpu", "latest", "v2")] == ["local-cpu", "hw-latest", "hw-v2"]


def test_model_name_without_slashes(view: StudyView) -> None:
    assert model_name(view) == "student-stdlib-coder"
    odd = dataclasses.replace(view, meta=view.meta | {"teacher": "meta:llama/tiny"})
    assert model_name(odd) == "student-meta-llama-tiny"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_an_unreachable_server_is_a_problem_in_one_line(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded.store.refill_outbox()
    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port()}")
        problem = try_drain(recorded.home, recorded.store, recorded.view)
    assert time.monotonic() - start < 20
    assert problem is not None and "\n" not in problem and "127.0.0.1" in problem
    assert len(recorded.store.outbox()) == CONFIRMED, "nothing is lost"
    assert try_drain(recorded.home, recorded.store, recorded.view) is None


def test_a_silent_server_holds_nobody_up(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts and never answers: one wait in the sink's own thread, and no turn is taken that a measurement would wait for."""
    recorded.store.refill_outbox()
    turns = []

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        turns.append(1)
        yield

    with socket.socket() as silent, monkeypatch.context() as patch:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        patch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        problem = try_drain(recorded.home, recorded.store, recorded.view, turn)
        assert time.monotonic() - start < 9
    assert problem is not None and "does not answer" in problem and "secret" not in problem
    assert turns == [] and len(recorded.store.outbox()) == CONFIRMED
    assert try_drain(recorded.home, recorded.store, recorded.view, turn) is None and turns


def test_a_damaged_database_is_a_problem_at_once(tmp_path: Path) -> None:
    store = new_study(tmp_path / "studies" / "night")
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    start = time.monotonic()
    problem = try_drain(tmp_path, store, load_view(store))
    assert problem is not None and "cannot be written" in problem and time.monotonic() - start < 10
    store.close()


def test_ui_needs_a_database_and_a_free_port(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no MLflow database"):
        serve_ui(tmp_path, 5000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(EnvironmentProblem, match="--port"):
            serve_ui(recorded.home, taken.getsockname()[1])


def test_ui_names_the_page_of_the_fronts(recorded: Recorded, tmp_path: Path) -> None:
    experiment = recorded.client.get_experiment_by_name(EXPERIMENT).experiment_id
    address = start_page(recorded.home, "/mlflow/")
    assert address.startswith(f"/mlflow/#/experiments/{experiment}/runs?")
    assert f"viewStateShareKey={VIEWS[0].key}&" in address
    (tmp_path / "mlflow.db").write_bytes(b"")
    assert start_page(tmp_path, "/mlflow/") == "/mlflow/"


def test_a_study_can_be_told_to_a_server(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As to a file, without a word on stdout; `paretune ui` is no such server, it only shows."""
    port = closed_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [*command, "--backend-store-uri", database_uri(recorded.home)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert answers(port, 90)
        recorded.store.refill_outbox()
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            assert try_drain(recorded.home, recorded.store, recorded.view) is None
        assert recorded.store.outbox() == [] and capfd.readouterr().out == ""
    finally:
        end_server(process)
    assert not answers(port, 0)


def answers(port: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.3)


def test_the_text_is_named_where_its_values_are(tmp_path: Path) -> None:
    store = new_study(tmp_path / "home" / "studies" / "texts")
    store.set_meta(corpus={"source": "/texts/<mine>.txt", "fingerprint": "c0ffee12"})
    confirm(store, candidate(), 2.0, 0.92, 21.0, source="baseline")
    view = load_view(store)
    assert "on /texts/&lt;mine&gt;.txt (fingerprint c0ffee12)" in report_html(view)
    params = study_params(view)
    assert params["text.fingerprint"] == "c0ffee12" and params["text.source"] == "/texts/<mine>.txt"
    store.close()


def test_measurements_come_in_between_the_steps_of_a_drain(recorded: Recorded) -> None:
    """Every step takes a turn of its own, none is taken inside another."""
    store = new_study(recorded.home / "studies" / "turns")
    for layers in (3, 4):
        confirm(store, candidate(layers, 576, INT4), 3.0 - layers / 10, 0.1 * layers, layers)
    turns, held = [], list[int]()

    @contextlib.contextmanager
    def turn() -> Iterator[None]:
        assert not held
        held.append(1)
        yield
        turns.append(held.pop())

    assert try_drain(recorded.home, store, load_view(store), turn) is None
    assert len(turns) == 1 + 2 + 2 + 1 + 1, "open, two runs, their standing, the registry, the parent"
    assert not store.outbox()
    store.close()


def test_the_housekeeper_does_not_keep_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While MLflow is told, a measurement gets the lock between two steps."""
    store = new_study(tmp_path / "studies" / "kept")
    confirm(store, candidate(), 2.0, 0.92, 21.0, source="baseline")
    lock, measured = MachineLock(), []

    def drain(_home: Path, _store: Store, _view: StudyView, turn: Any) -> None:
        for _ in range(2):
            with turn(), pytest.raises(EnvironmentProblem), lock.exclusive(0.0):
                """A step holds it."""
            with lock.exclusive(5.0):
                measured.append(1)

    monkeypatch.setattr(housekeeper_module, "try_drain", drain)
    keeper = Housekeeper(store, tmp_path)
    keeper.tidy()
    wait(lambda: len(measured) == 2, what="the steps")
    assert keeper.finish() is not None, "nothing was really told"
    store.close()


def test_nobody_waits_for_the_housekeeper_and_rounds_are_not_piled_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_study(tmp_path / "studies" / "kept")
    confirm(store, candidate(), 2.0, 0.92, 21.0, source="baseline")
    go_on, begun = threading.Event(), []

    def drain(_home: Path, _store: Store, view: StudyView, _turn: Any) -> None:
        begun.append(len(view.confirmed))
        go_on.wait(60)

    monkeypatch.setattr(housekeeper_module, "try_drain", drain)
    keeper = Housekeeper(store, tmp_path)
    keeper.tidy()
    wait(lambda: begun == [1], what="the first round")
    confirm(store, candidate(ffn=512), 2.1, 0.8, 15.0)
    for _ in range(5):
        keeper.tidy()
    assert begun == [1]
    go_on.set()
    wait(lambda: keeper._thread is None, what="the end of the rounds")
    assert begun == [1, 2], "one more round, with what had come meanwhile"
    assert "2 results are not in MLflow yet" in str(keeper.finish())
    assert (store.folder / "report.html").is_file()
    store.close()


def test_a_further_target_has_its_own_tags_costs_and_alias(recorded: Recorded) -> None:
    store = new_study(recorded.home / "studies" / "targets")
    fill(store)
    add_board(store)
    assert try_drain(recorded.home, store, load_view(store)) is None
    there = Recorded(recorded.home, store, recorded.client)
    runs, view = there.children(), there.view
    board = view_on(view, view.targets[0])
    for key, run in runs.items():
        on_board = any(p.key == key for p in board.front)
        assert ("board" in run.data.tags["pareto_on"].split(", ")) == on_board
        assert ("board/decode_ms_per_token" in run.data.metrics) == (board.point(key) is not None)
        wanted = on_board or any(p.key == key for p in view.front)
        assert (local(run) / "artifact").is_dir() == wanted
    (chosen,) = [run for run in runs.values() if "board" in run.data.tags["recommended_for"].split(", ")]
    assert recommended(board).chosen.key == chosen.data.tags["paretune.candidate"]  # type: ignore[union-attr]
    assert chosen.data.tags["recommended"] == "false", "int4 is slow on that board, and only there"
    name = model_name(view)
    assert recorded.client.get_model_version_by_alias(name, "board").run_id == chosen.info.run_id
    note = there.parent.data.tags["mlflow.note.content"]
    assert "board" in note and "predicted" in note and "](" not in note.replace("![The front](", ""), (
        "no accidental link"
    )
    store.close()


def test_filters_in_the_documentation_find_runs(recorded: Recorded) -> None:
    """Every filter of docs/mlflow.md is one that MLflow takes, and finds what is there."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "mlflow.md").read_text()
    table = page.split("## Filters")[1].split("##")[0]
    filters = [two or one for two, one in re.findall(r"^\| (?:``(.+?)``|`(.+?)`) \|", table, re.MULTILINE)]
    assert len(filters) >= 10
    experiment = recorded.client.get_experiment_by_name(EXPERIMENT).experiment_id
    store = new_study(recorded.home / "studies" / "night-2")
    fill(store)
    add_board(store)
    assert try_drain(recorded.home, store, load_view(store)) is None
    store.close()
    for condition in filters:
        assert recorded.client.search_runs([experiment], condition), condition
    assert not recorded.client.search_runs([experiment], "tags.kind = 'nothing'")
