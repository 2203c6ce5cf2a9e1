"""`paretune op-profile` on the tiny teacher and artifacts of it: the engine's real profile, torch's, and what is kept of them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from typer.main import get_command

from paretune.cli import app as cli
from paretune.common.checksums import FACTS, MODEL, write_checksums
from paretune.common.errors import Infeasible, UsageError
from paretune.compression.export.artifact import describe_artifact, write_artifact
from paretune.compression.network.student import Network
from paretune.hardware_profiles import fingerprint, load_profile
from paretune.objectives.profiler import findings as findings_module
from paretune.objectives.profiler import run as module
from paretune.objectives.profiler.findings import findings_file, keep_findings, kept_findings, profiled_candidates
from paretune.objectives.profiler.op_costs import Roof
from paretune.objectives.profiler.op_profile import OpProfile
from paretune.objectives.profiler.places import Findings
from paretune.objectives.profiler.run import ProfileRequest, profile_ops
from paretune.search.budget import Budget
from paretune.search.estimation.state import SearchState
from paretune.search.policy.director import Director
from paretune.search.prepare.prepare import prepare
from paretune.search.prepare.studies import create_study
from paretune.search.spec import Spec
from paretune.search.study.store import Store
from paretune.spaces import Candidate, Format, Layer, Space
from paretune.spaces.mixed import stored_bits
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.tracking.charts.op_profile_picture import profile_picture
from paretune.tracking.charts.op_profile_points import layer_bars, roof_lines, roof_points
from paretune.tracking.report.op_profile_page import profile_html
from support.decoders import decoder

PROMPT, TOKENS = 16, 6
INT4 = Format(4, 32, "int8")
FOUND = Findings((("head", 0.3), ("ffn", 0.2), ("attention", 0.1)), ((1, 0.05),))


@pytest.fixture(scope="module", autouse=True)
def roof() -> Iterator[None]:
    """What a machine reaches is measured elsewhere (tests of calibration); here it is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measured_roof", lambda threads: Roof(20.0, 100.0, 300.0, f"given, {threads} thread"))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def work(home: Path) -> ProfileRequest:
    return ProfileRequest(load_profile("local-cpu", home), home, PROMPT, TOKENS)


@pytest.fixture(scope="module")
def teacher_profile(tiny_teacher_dir: Path, work: ProfileRequest) -> OpProfile:
    return profile_ops(str(tiny_teacher_dir), work)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Teacher) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "student"
    candidate = Candidate((Layer(128, 2, INT4, INT4),) * 3, INT4)
    write_artifact(folder, tiny_teacher, candidate.canonical(tiny_teacher.shape), tiny_teacher.weights(), {})
    return folder


@pytest.fixture
def damaged(artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_layer_and_group_of_the_teacher_has_its_time(teacher_profile: OpProfile) -> None:
    for phase in ("prefill", "decode"):
        places = {t.label for t in teacher_profile.totals(phase, "places")}
        assert {f"layer {i} {group}" for i in range(3) for group in ("attention", "ffn")} | {
            "embedding",
            "head",
        } <= places
        assert all(t.ms > 0 for t in teacher_profile.totals(phase, "groups"))
    m = teacher_profile.measurements
    assert m["throughput_tokens_per_s"].value == pytest.approx(1e3 / m["decode_ms_per_token"].value)
    assert m["peak_memory_bytes"].value > 0 < m["load_ms"].value
    assert all(m[n].low <= m[n].value <= m[n].high for n in ("ttft_ms", "decode_ms_per_token"))


def test_weights_are_read_once_per_step_and_arithmetic_is_what_torch_counts(
    teacher_profile: OpProfile, tiny_teacher: Teacher
) -> None:
    """The engine's matrices by shapes seen in its trace, against the checkpoint's own tensors and torch's own counting."""
    matrices = [c for c in teacher_profile.costs if c.phase == "decode" and c.matrix]
    weights = sum(w.numel() for w in tiny_teacher.weights().values() if w.ndim == 2)  # the tied table is the head's
    assert sum(c.weight_bytes(c.form) for c in matrices) == 4 * weights
    prefill = sum(c.flops for c in teacher_profile.costs if c.phase == "prefill" and c.matrix)
    counted = sum(op.flops for op in teacher_profile.torch["prefill"].ops if op.op in ("aten::mm", "aten::addmm"))
    assert prefill == counted == 2 * PROMPT * weights


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_families_with_biases_and_other_norms_have_all_their_matrices(
    family: str, write_teacher: Callable[..., Path], tmp_path: Path, work: ProfileRequest
) -> None:
    found = profile_ops(str(write_teacher(tmp_path / family, family=family)), work)
    tensors = load_teacher(str(tmp_path / family)).weights()
    weights = sum(w.numel() for name, w in tensors.items() if w.ndim == 2 and "positions" not in name)
    for phase, rows in (("prefill", PROMPT), ("decode", 1)):
        matrices = [c for c in found.costs if c.phase == phase and c.matrix]
        assert sum(c.weight_bytes(c.form) for c in matrices) == 4 * weights
        assert sum(c.flops for c in matrices) == 2 * rows * weights
    assert [name for name, _ in found.torch["decode"].parts] == ["layer 0", "layer 1", "layer 2", "head"]


def test_torch_is_told_layer_by_layer(teacher_profile: OpProfile) -> None:
    for seen in teacher_profile.torch.values():
        assert [name for name, _ in seen.parts] == ["layer 0", "layer 1", "layer 2", "head"]
        assert all(ms > 0 for _, ms in seen.parts) and seen.ms > 0


def test_steps_with_a_cache_are_those_without(tiny_teacher: Teacher) -> None:
    network = Network(tiny_teacher.config, tiny_teacher.shape, 3)
    weights, ids = tiny_teacher.weights(), torch.arange(1, 9)[None]
    with torch.no_grad():
        whole = network.hidden(weights, ids)
        _, past = network.cached(weights, ids[:, :5])
        later, _ = network.cached(weights, ids[:, 5:], past)
        alone, _ = network.cached(weights, ids[:, 5:])
    assert torch.allclose(later, whole[:, 5:], atol=1e-5)
    assert not torch.allclose(alone, whole[:, 5:], atol=1e-2)  # negative control: the past matters


def test_the_whole_answer_is_json_and_a_picture(teacher_profile: OpProfile, tmp_path: Path) -> None:
    data = json.loads(json.dumps(teacher_profile.to_dict()))
    assert data["settings"]["threads"] == 1 and data["findings"]["groups"]
    assert data["phases"]["decode"]["ops"][0]["ms"] >= data["phases"]["decode"]["ops"][1]["ms"]
    for name in ("profile.svg", "profile.png"):
        profile_picture(teacher_profile, tmp_path / name)
    assert (tmp_path / "profile.svg").read_text().count("<svg") == 1
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"
    page = profile_html(teacher_profile)
    assert all(place.text in page for place in teacher_profile.best) and "MatMul" in page


def test_the_picture_draws_all_of_a_step_and_a_roof_that_bends_at_the_ridge(teacher_profile: OpProfile) -> None:
    _, bars = layer_bars(teacher_profile)
    drawn = sum(ms for values in bars.values() for ms in values)
    ops = sum(c.ms for c in teacher_profile.costs if c.phase == "decode")
    assert drawn == pytest.approx(ops + teacher_profile.between_ms("decode"))
    xs, ys = roof_lines(teacher_profile)["fp32 roof"]
    assert all(y == pytest.approx(min(100.0, 20.0 * x)) for x, y in zip(xs, ys, strict=True))
    assert ys[0] < 100.0 == ys[-1] and {p.phase for p in roof_points(teacher_profile)} == {"prefill", "decode"}


# artifacts


def test_an_artifacts_weights_have_their_own_bits(artifact: Path, work: ProfileRequest, tiny_teacher: Teacher) -> None:
    found = profile_ops(str(artifact), work)
    assert found.subject.kind == "artifact" and found.torch == {}
    assert {c.op for c in found.costs if c.matrix} == {"MatMulNBits"}
    shapes = [(w.shape[0], w.shape[1]) for w in tiny_teacher.weights().values() if w.ndim == 2]
    read = sum(c.weight_bytes(c.form) for c in found.costs if c.phase == "decode")
    assert read == stored_bits(INT4, shapes) / 8
    assert not [place for place in found.options if place.change == "int4"]
    assert kept_findings(work.home / "cache", found.subject.digest, work.profile) is None


def test_what_another_engine_measured_is_not_compared(damaged: Path, work: ProfileRequest) -> None:
    then = {"value": 1e-6, "unit": "ms/token", "low": 1e-6, "high": 1e-6, "provenance": "measured"}
    told: dict[str, Any] = {
        "profile": work.profile.name,
        "measurements": {"decode_ms_per_token": {**then, "fingerprint": "older"}},
    }
    describe_artifact(damaged, told)
    assert any("another version of the engine" in note for note in profile_ops(str(damaged), work).notes)
    told["measurements"]["decode_ms_per_token"]["fingerprint"] = fingerprint()
    describe_artifact(damaged, told)
    assert any("its study said" in note for note in profile_ops(str(damaged), work).notes)


def test_a_damaged_artifact_is_refused_by_name(damaged: Path, work: ProfileRequest) -> None:
    data = bytearray((damaged / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / MODEL).write_bytes(data)
    with pytest.raises(UsageError, match=r"model\.onnx is missing or differs from its checksum"):
        profile_ops(str(damaged), work)


def test_an_artifact_without_checksums_is_refused(damaged: Path, work: ProfileRequest) -> None:
    (damaged / "SHA256SUMS").unlink()
    with pytest.raises(UsageError, match="is not an artifact: it has no SHA256SUMS"):
        profile_ops(str(damaged), work)


def test_a_graph_for_a_later_engine_is_infeasible(damaged: Path, work: ProfileRequest) -> None:
    model = onnx.load(str(damaged / MODEL))
    model.ir_version = 99
    (damaged / MODEL).write_bytes(model.SerializeToString())
    write_checksums(damaged)
    with pytest.raises(Infeasible, match=r"the engine refused to load.*IR version"):
        profile_ops(str(damaged), work)


def test_a_graph_that_is_not_what_its_description_says_is_refused(damaged: Path, work: ProfileRequest) -> None:
    facts = json.loads((damaged / FACTS).read_text())
    facts["candidate"]["layers"] = facts["candidate"]["layers"][:2]
    (damaged / FACTS).write_text(json.dumps(facts))
    write_checksums(damaged)
    with pytest.raises(UsageError, match=r"must have 2 layers, but the engine ran /model/layers\.2"):
        profile_ops(str(damaged), work)


@pytest.mark.parametrize(
    ("changed", "problem"), [({"kind": "module"}, "a module of a plug-in"), ({"teacher": None}, "")]
)
def test_what_is_no_decoder_is_refused(
    damaged: Path, work: ProfileRequest, changed: dict[str, Any], problem: str
) -> None:
    facts = {**json.loads((damaged / FACTS).read_text()), **changed}
    if changed.get("teacher", "") is None:
        del facts["teacher"]
        problem = "does not describe a decoder"
    (damaged / FACTS).write_text(json.dumps(facts))
    write_checksums(damaged)
    with pytest.raises(UsageError, match=problem):
        profile_ops(str(damaged), work)


@pytest.mark.parametrize("model", ["", "nowhere", "plugin:digits", "x" * 5000])
def test_what_is_no_model_is_refused(work: ProfileRequest, model: str) -> None:
    with pytest.raises(UsageError, match=r"MODEL must be 'stdlib-coder'|MODEL x+… cannot be read: File name too long"):
        profile_ops(model, work)


def test_a_prompt_beyond_the_context_is_refused(tiny_teacher_dir: Path, work: ProfileRequest, artifact: Path) -> None:
    long = ProfileRequest(work.profile, work.home, 510, 3)
    for model in (tiny_teacher_dir, artifact):
        with pytest.raises(UsageError, match=r"context of 512 tokens, but are 510 \+ 3"):
            profile_ops(str(model), long)


# what a search makes of it


def test_findings_are_kept_by_what_they_depend_on(
    teacher_profile: OpProfile, work: ProfileRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, digest = work.home / "cache", teacher_profile.subject.digest
    assert kept_findings(cache, digest, work.profile) == teacher_profile.findings
    assert kept_findings(cache, "another", work.profile) is None
    assert kept_findings(cache, digest, work.profile.model_copy(update={"threads": 7})) is None
    monkeypatch.setattr(findings_module, "package_version", lambda _name: "0.0.1")
    assert kept_findings(cache, digest, work.profile) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"groups": [["tail", 1]], "layers": []}', '{"groups": 3, "layers": []}'])
def test_damaged_findings_are_as_none(tmp_path: Path, work: ProfileRequest, text: str) -> None:
    keep_findings(tmp_path, "d", work.profile, FOUND)
    assert kept_findings(tmp_path, "d", work.profile) == FOUND
    findings_file(tmp_path, "d", work.profile).write_text(text)
    with pytest.warns(RuntimeWarning, match="is damaged and is made anew"):
        assert kept_findings(tmp_path, "d", work.profile) is None


def bits(candidate: Any) -> tuple[int, int, int]:
    layer = candidate.layers[0]
    return layer.attention_format.bits, layer.ffn_format.bits, candidate.head_format.bits


def test_first_candidates_quantize_what_pays_most_first(tiny_space: Space) -> None:
    found = [decoder(c) for c in profiled_candidates(tiny_space, FOUND)]
    assert [(len(c.layers), bits(c)) for c in found[:3]] == [(3, (8, 8, 4)), (3, (8, 4, 4)), (3, (4, 4, 4))]
    assert [(len(c.layers), bits(c)) for c in found[3:]] == [(2, (8, 8, 4))]
    turned = Findings(FOUND.groups[::-1], FOUND.layers)
    assert bits(profiled_candidates(tiny_space, turned)[0]) == bits(found[0])[::-1]  # negative control
    assert all(tiny_space.encode(c) for c in found)  # a sampler can learn from them


def test_layers_go_first_where_that_pays_more(tiny_space: Space) -> None:
    found = [decoder(c) for c in profiled_candidates(tiny_space, Findings(FOUND.groups, ((1, 9.0),)))]
    assert [len(c.layers) for c in found] == [2, 3, 3, 3]
    assert profiled_candidates(tiny_space, None) == [] == profiled_candidates(tiny_space, Findings((), ((1, 1.0),)))


def test_without_int4_the_rest_stays_as_it_is(tiny_teacher: Teacher) -> None:
    space = Space.of(tiny_teacher.shape, ("fp32/fp32", "int8/int8"))
    assert bits(profiled_candidates(space, FOUND)[0]) == (32, 32, 8)
    assert profiled_candidates(Space.of(tiny_teacher.shape, ("fp32/fp32",)), FOUND) == []


def test_a_search_starts_from_the_findings_of_when_it_was_made(
    tiny_teacher_dir: Path, tiny_text: Path, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    spec = Spec.model_validate({"teacher": str(tiny_teacher_dir), "data": str(tiny_text), "budget": "300s"})
    profile = load_profile("local-cpu", tmp_path)
    ready = prepare(spec, tmp_path)
    sequential = replace(ready, spec=spec.model_copy(update={"sampler": "sequential"}))
    first, notes = {}, {}
    for name, what in (("before", ready), ("after", ready), ("sequential", sequential)):
        if name == "after":
            keep_findings(tmp_path / "cache", tiny_teacher.digest, profile, FOUND)
        store = create_study(what, tmp_path, name, "paretune search")
        first[name] = Director(SearchState(store, spec, ready.space, Budget(300.0, 0.0, {}))).seeds()
        notes[name] = store.meta("notes")
        store.close()
    assert notes["after"] == [*notes["before"], f"seeded from the profile: {FOUND.text}"]
    expected = profiled_candidates(ready.space, FOUND)
    assert first["after"][: len(expected)] == expected
    assert first["before"][0] not in expected[:3]  # negative control: without findings others come first
    assert set(first["before"]) <= set(first["after"])
    assert notes["sequential"] == notes["before"] and first["sequential"] == first["before"]
    store = Store.reader(tmp_path / "studies" / "before")  # what is found later changes nothing in it
    assert store.meta("findings") is None
    store.close()


# the command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path) -> Any:
    def call(*arguments: object, command: str = "op-profile") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paretune", command, *map(str, arguments), "--home", str(home)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return call


def test_its_name_of_before_still_works_and_is_not_shown(run: Any) -> None:
    assert run("no such model", command="profile")[0] == run("no such model")[0] == 2
    commands: Any = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert commands["profile"].hidden and not commands["op-profile"].hidden


def test_the_command_prints_tables_writes_files_and_logs_a_run(
    run: Any,
    teacher_profile: OpProfile,
    tiny_teacher_dir: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "profile_ops", lambda _model, _work: teacher_profile)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, out, err = run(tiny_teacher_dir, "--out", tmp_path / "out")
    assert code == 0, err
    assert all(
        text in out for text in ("decode by fused op", "prefill by fused op", "where compression would pay", "layer 2")
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"profile.json", "profile.html", "profile.svg"}
    from paretune.tracking.mlflow.sink import MlflowSink

    with MlflowSink(home).opened() as (client, experiment):
        (logged,) = client.search_runs([experiment])
        files = {f.path for f in client.list_artifacts(logged.info.run_id)}
    assert logged.info.run_name == "profile tiny" and files == {"profile.json", "profile.html", "profile.svg"}
    assert logged.data.tags["kind"] == "profile"
    decode = teacher_profile.measurements["decode_ms_per_token"].value
    assert np.isclose(logged.data.metrics["decode_ms_per_token"], decode)


def test_a_profile_is_told_also_where_mlflow_cannot_be_written(
    run: Any, teacher_profile: OpProfile, tiny_teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "profile_ops", lambda _model, _work: teacher_profile)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = run(tiny_teacher_dir, "--json")
    assert code == 0 and json.loads(out)["subject"]["name"] == "tiny"
    assert "the op profile is not in MLflow" in err


def test_bad_input_gets_one_sentence(run: Any, tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "nowhere")
    assert code == 2 and "MODEL must be" in err and "remedy" in err
    code, _, err = run("stdlib-coder", "--prompt", 100_000)
    assert code == 2 and "context of" in err
    code, _, err = run("stdlib-coder", "--profile", "local-cpuu")
    assert code == 2 and "did you mean 'local-cpu'" in err
