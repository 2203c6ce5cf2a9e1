"""The main job for real, at toy size: a user's own checkpoint and text, Ray, ONNX Runtime, MLflow, artifact, re-measurement."""

import json
import shutil

import pytest

from paretune.search.front import dominates
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from support.commands import paretune

pytestmark = pytest.mark.timeout(290)


@pytest.fixture
def view(night):
    store = Store.reader(night[0] / "mlruns" / "studies" / night[1]["study"])
    yield load_view(store)
    store.close()


def test_the_search_explored_recovered_and_confirmed(night, view):
    _, status = night
    assert status["state"] == "complete" and status["explored"] >= 20
    assert status["spent_s"] <= 200
    assert [p.name for p in view.baselines] == ["teacher fp32", "teacher int8", "teacher int4"]
    assert len(view.confirmed) > 3, "no finalist was confirmed"


def test_nothing_on_the_front_is_dominated_by_a_baseline(view):
    for point in view.front:
        for baseline in view.baselines:
            assert not dominates(baseline.vector(view.objectives), point.vector(view.objectives))


def test_every_number_says_where_it_comes_from(view):
    for point in view.confirmed:
        assert {
            "nll",
            "kl",
            "top1_agreement",
            "decode_ms_per_token",
            "ttft_ms",
            "peak_memory_bytes",
            "compressed_bytes",
        } <= point.measurements.keys()
        assert all(m.provenance in ("measured", "disturbed") and m.unit for m in point.measurements.values())
        assert point.measurements["nll"].low <= point.measurements["nll"].value <= point.measurements["nll"].high
    for point in view.rung0:
        assert point.measurements["estimated_nll"].provenance == "predicted"
        assert point.measurements["decode_ms_per_token"].provenance == "predicted"


def test_the_artifact_alone_generates_text(night, view, tmp_path):
    point = next(p for p in view.front if p.source != "baseline")
    shutil.copytree(view.folder / "artifacts" / point.key, tmp_path / "alone")
    done = paretune("generate", "alone", "--prompt", "the model", "--max-tokens", "12", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["tokens"] == 12 and made["tokens_per_second"] > 0 and len(made["text"]) > 0
    (tmp_path / "alone" / "onnx" / "model.onnx").write_bytes(
        b"\0" + (tmp_path / "alone" / "onnx" / "model.onnx").read_bytes()[1:]
    )
    damaged = paretune("generate", "alone", "--prompt", "x", cwd=tmp_path)
    assert damaged.returncode == 2 and "differs from its checksum" in " ".join(damaged.stderr.split())


def test_measure_compares_with_the_study(night, view):
    point = view.front[0]
    done = paretune("measure", view.folder / "artifacts" / point.key, "--within", "10%", "--json", cwd=night[0])
    assert done.returncode == 0, done.stderr
    compared = json.loads(done.stdout)["compared"]["decode_ms_per_token"]
    assert compared["then"]["value"] == point.measurements["decode_ms_per_token"].value
    assert compared["now"]["value"] > 0 and compared["now"]["provenance"] in ("measured", "disturbed")


def test_mlflow_shows_the_study_and_can_be_rebuilt(night, view):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{night[0] / 'mlruns' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "paretune"]

    def children():
        runs = client.search_runs([experiment.experiment_id], max_results=1000)
        ours = [r for r in runs if r.data.tags.get("paretune.study") == view.study]
        return {r.data.tags["paretune.candidate"]: r for r in ours if "paretune.candidate" in r.data.tags}

    before = children()
    assert before.keys() == {p.key for p in view.confirmed}
    front = {p.key for p in view.front}
    assert {key for key, run in before.items() if run.data.tags["pareto"] == "true"} == front
    again = paretune("sync", cwd=night[0])
    assert again.returncode == 0, again.stderr
    assert {k: r.info.run_id for k, r in children().items()} == {k: r.info.run_id for k, r in before.items()}


def test_complete_study_is_not_run_again(night, view):
    done = paretune("search", "spec.yaml", "--study", view.study, cwd=night[0])
    assert done.returncode == 2 and "is complete" in " ".join(done.stderr.split())
