"""A whole search over a plug-in's module with the real evaluator: store, sampler, director, lane, front, report, MLflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretune.common.checksums import check_artifact
from paretune.common.errors import UsageError
from paretune.search.evaluators.plugin import PluginEvaluator
from paretune.search.execution.inline import run_inline
from paretune.search.execution.run import run_study
from paretune.search.execution.trainable import EVALUATOR, make_evaluator
from paretune.search.front import dominates
from paretune.search.prepare.prepare import prepare
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.recommend.recommend import Limits, recommend
from paretune.search.spec import Spec
from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view
from paretune.tracking.mlflow.sink import try_drain
from paretune.tracking.report.report import report_html, write_report
from support.commands import SHARES

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits"
SPEC: dict[str, Any] = {
    "teacher": "plugin:paretune_digits:Digits",
    "budget": "150s",  # it ends when its candidates are done; a slow machine needs a third of this for the baselines
    "fit_points": 8,
    "finalists": 1,
    "max_candidates": 8,
    "shares": SHARES,
    "seed": 3,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ready, Path]]:
    """What `paretune search` prepares in the example's folder."""
    home, before = tmp_path_factory.mktemp("home"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLE)
        yield prepare(Spec.model_validate(SPEC), home), home
    assert Path.cwd() == before


@pytest.fixture(scope="module")
def study(prepared: tuple[Ready, Path]) -> StudyView:
    """A finished search, its lane with fewer visits than usual."""
    ready, home = prepared
    store = create_study(ready, home, "digits", "paretune search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paretune.objectives.latency.benchmark.VISITS", 2)
        patch.setattr("paretune.objectives.latency.benchmark.RETRIES", 0)
        patch.setattr("paretune.objectives.latency.benchmark.NOMINAL_VISITS", 2)

        def execute(director: Any, folder: Path, home: Path, *_: Any) -> None:
            run_inline(director, PluginEvaluator(folder, home).run)

        code = run_study(store, ready, home, lambda _kind, _data: None, execute=execute)
    view = load_view(store)
    assert code == 0, [e.text for e in view.events]
    write_report(view)
    assert try_drain(home, store, view) is None
    store.close()
    return view


def test_the_settings_follow_from_the_plugin(prepared: tuple[Ready, Path]) -> None:
    ready, _ = prepared
    assert ready.spec.objectives == ("squared_error", "forward_ms", "compressed_bytes")
    assert ready.plan.text == {"train": 1184, "calibration": 64, "search": 224, "report": 320}
    assert ready.plan.text_unit == "examples"
    with pytest.raises(UsageError, match="brings its own data"):
        prepare(ready.spec.model_copy(update={"data": "text.txt"}), prepared[1])
    with pytest.raises(UsageError, match="sequential sampler orders a decoder's axes"):
        prepare(ready.spec.model_copy(update={"sampler": "sequential"}), prepared[1])
    wrong = Spec.model_validate({**SPEC, "objectives": ["nll", "forward_ms"]})
    with pytest.raises(UsageError, match="objectives of this plug-in are squared_error and others of forward_ms"):
        prepare(wrong, prepared[1])


def test_everything_was_confirmed_that_should_be(study: StudyView) -> None:
    assert [p.name for p in study.baselines] == ["teacher fp32", "teacher int8", "teacher int4"]
    assert len(study.confirmed) > 3, "no finalist was confirmed"
    assert len(study.rung0) == 8
    assert not study.failures
    for point in study.confirmed:
        assert {
            "squared_error",
            "psnr",
            "relative_loss",
            "forward_ms",
            "peak_memory_bytes",
        } <= point.measurements.keys()
        assert all(m.unit and m.provenance in ("measured", "disturbed") for m in point.measurements.values())
        assert "nll" not in point.measurements and "decode_ms_per_token" not in point.measurements
        assert point.facts["parity"] < 1e-4
    for point in study.rung0:
        assert point.measurements["estimated_squared_error"].provenance == "predicted"
        assert point.measurements["forward_ms"].provenance == "predicted"


def test_the_front_is_of_the_plugins_quality(study: StudyView) -> None:
    assert study.objectives == ("squared_error", "forward_ms", "compressed_bytes")
    for point in study.front:
        for baseline in study.baselines:
            assert not dominates(baseline.vector(study.objectives), point.vector(study.objectives))
    teacher = study.teacher
    assert teacher is not None and teacher.measurements["relative_loss"].value == 0.0
    smallest = min(study.confirmed, key=lambda p: p.measurements["compressed_bytes"].value)
    assert smallest.measurements["compressed_bytes"].value < 0.5 * teacher.measurements["compressed_bytes"].value


def test_report_recommendation_and_mlflow_speak_of_it(study: StudyView, prepared: tuple[Ready, Path]) -> None:
    page = report_html(study)
    assert "squared error (squared error/pixel)" in page and "forward (ms)" in page
    assert "NLL" not in page and "decode per token" not in page
    if study.front:  # all latencies may have been disturbed
        found = recommend(study, Limits())
        assert "squared error" in found.why[1] and "nll" not in json.dumps(found.to_dict())
        assert recommend(study, Limits(latency_ms=1e9)).chosen in study.front
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{prepared[1] / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "paretune"]
    runs = [r for r in client.search_runs([experiment.experiment_id]) if "paretune.candidate" in r.data.tags]
    assert {r.data.tags["paretune.candidate"] for r in runs} == {p.key for p in study.confirmed}
    assert all({"squared_error", "psnr", "forward_ms"} <= r.data.metrics.keys() for r in runs)
    assert all("precision_encoder" in r.data.params for r in runs)


def test_the_artifact_alone_gives_the_quality_that_was_told(study: StudyView, tmp_path: Path) -> None:
    import onnxruntime as ort
    from paretune_digits import Digits

    point = next(p for p in study.confirmed if p.source != "baseline")
    alone = shutil.copytree(study.folder / "artifacts" / point.key, tmp_path / "alone")
    assert check_artifact(alone)["kind"] == "module"
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(str(alone / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    errors = [
        np.square(session.run(None, {"input0": b.inputs[0].numpy()})[0] - b.target.numpy()).mean(axis=(1, 2, 3))
        for b in Digits().batches("report")
    ]
    assert np.concatenate(errors).mean() == pytest.approx(point.measurements["squared_error"].value, rel=1e-5)
    (alone / "torch" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="differs from its checksum"):
        check_artifact(alone)


def test_commands_on_a_plugins_study(study: StudyView, prepared: tuple[Ready, Path]) -> None:
    def paretune(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paretune", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=prepared[1], timeout=120, env=dict(os.environ)
        )

    artifact = str(study.folder / "artifacts" / study.confirmed[0].key)
    refused = paretune("generate", artifact, "--prompt", "x")
    assert refused.returncode == 2 and "is a module of a plug-in" in " ".join(refused.stderr.split())
    shown = paretune("front", "--home", str(prepared[1]), "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["objectives"] == list(study.objectives)


def test_a_worker_takes_the_evaluator_of_the_study(study: StudyView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EVALUATOR, raising=False)
    evaluator = make_evaluator(study.folder, study.folder.parents[1])
    assert isinstance(evaluator, PluginEvaluator) and evaluator.space.teacher.name == "digits"


def test_a_complete_study_is_read_without_the_plugin(study: StudyView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paretune.teachers.plugins.plugin.find_plugin", None)
    store = Store.reader(study.folder)
    try:
        assert [p.key for p in load_view(store).front] == [p.key for p in study.front]
    finally:
        store.close()
