"""The real evaluator on candidates of second-order methods: what is scored, recovered and shipped are the same codes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paretune.common.checksums import MODEL
from paretune.common.errors import Infeasible
from paretune.compression.export import artifact
from paretune.compression.export.graph import save_model
from paretune.compression.network import student
from paretune.compression.network.student import Network, quantized_weights
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles import MachineLock
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.latency.benchmark import LatencyResult, Nominal
from paretune.objectives.latency.nominal import _read as _nominal
from paretune.objectives.measurement import Measurement
from paretune.search.estimation.estimates import Estimates
from paretune.search.evaluators.decoder import DecoderEvaluator
from paretune.search.evaluators.workspace import Workspace
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.samplers.optuna_sampler import distributions, frozen_trial
from paretune.search.spec import Spec
from paretune.search.tasks.base import Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.fit import Fit
from paretune.search.tasks.recover import Recover
from paretune.spaces import Candidate, Format, Layer, Pattern, Space
from paretune.teachers.checkpoint.teacher import load_teacher
from support.decoders import decoder_design
from support.plans import empty_plan

INT4, GPTQ = Format(4, 32, "fp32"), Format(4, 32, "fp32", "gptq")


def whole(form: Format, pattern: Pattern = Pattern()) -> Candidate:  # noqa: B008 (frozen)
    return Candidate((Layer(128, 2, form, form, pattern),) * 3, form, Format(8, 32))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, tiny_text: Path) -> tuple[Path, Path]:
    """(study folder, home) of a study that nothing has run in."""
    home = tmp_path_factory.mktemp("home")
    spec = Spec.model_validate(
        {"teacher": str(tiny_teacher_dir), "data": str(tiny_text), "budget": "300s", "search_tokens": 4000}
    )
    teacher, profile = load_teacher(spec.teacher), detected_profile()
    space = Space.of(teacher.shape, profile.weight_formats)
    plan = empty_plan(space, spec)
    store = create_study(Ready(spec, teacher, profile, space, plan), home, "s", "paretune search")
    store.close()
    return home / "studies" / "s", home


@pytest.fixture(scope="module")
def evaluator(study: tuple[Path, Path]) -> DecoderEvaluator:
    return DecoderEvaluator(*study)


def done(evaluator: DecoderEvaluator, task: Task) -> Any:
    outcome = evaluator.run(task)
    assert outcome.status == "complete", outcome.reason
    return outcome.result


def test_gptq_keeps_the_logits_of_other_text_closer_at_the_same_size(evaluator: DecoderEvaluator) -> None:
    """Not the NLL: of a random teacher rounding moves it in either direction."""
    nearest, calibrated = (done(evaluator, Explore(whole(form))) for form in (INT4, GPTQ))
    assert calibrated.scores.mean_nll != nearest.scores.mean_nll
    assert calibrated.measurements["bytes"].value == nearest.measurements["bytes"].value
    space, ids = evaluator.space, torch.from_numpy(evaluator.space.search_windows.ids[:8])
    weights, network = space.teacher_weights, space.network(3)
    with torch.no_grad():
        exact = network(quantized_weights(weights, whole(Format())), ids)
        errors = [
            float((network(quantized_weights(weights, c, space.codes(c, weights)), ids) - exact).square().mean())
            for c in (whole(GPTQ), whole(INT4))
        ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("kind", ["2:4", "unstructured", "block"])
def test_every_pattern_and_score_is_scored_with_its_zeros(evaluator: DecoderEvaluator, kind: Any, score: Any) -> None:
    candidate = whole(GPTQ, Pattern(kind, 0.5, score))
    outcome = done(evaluator, Explore(candidate))
    assert outcome.facts()["sparsity"] == pytest.approx(0.5, abs=0.01)
    weights, masks = evaluator.space.sparsify(candidate, evaluator.space.dense_weights(candidate))
    assert len(masks) == 21
    dense = evaluator.space.teacher_weights
    for name, mask in masks.items():
        assert (weights[name][~mask] == 0).all(), name
        assert torch.equal(weights[name][mask], dense[name][mask]) == (score != "sparsegpt"), name


def test_what_was_recovered_ships_with_the_codes_of_its_weights(
    evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = whole(GPTQ, Pattern("2:4", 0.5, "sparsegpt"))
    recovered = done(evaluator, Recover(candidate, tokens=8192, seconds_left=60.0))
    assert recovered.recovered.qat is False
    assert recovered.details["search_nll_after"] != recovered.details["search_nll_before"]
    benchmark = {n: Measurement.exact(1.0, "ms") for n in ("decode_ms_per_token", "ttft_ms")}
    monkeypatch.setattr(evaluator.measuring, "measure", lambda *_: LatencyResult(benchmark, True))
    done(
        evaluator, Confirm(Candidate((Layer(128, 2),) * 3), seconds_left=60.0)
    )  # the teacher comes first, others are compared to it
    shipped: dict[str, Any] = {}
    honest = evaluator.space.codes

    def watched(candidate: Candidate, weights: Any) -> Any:
        shipped["weights"], shipped["codes"] = weights, honest(candidate, weights)
        return shipped["codes"]

    monkeypatch.setattr(evaluator.space, "codes", watched)
    confirmed = done(evaluator, Confirm(candidate, recovered.recovered, seconds_left=60.0))
    assert confirmed.artifact is not None and (Path(confirmed.artifact[0]) / MODEL).is_file()
    with torch.no_grad():
        again = evaluator.score_in_torch(candidate, shipped["weights"], shipped["codes"])
    assert again.mean_nll == pytest.approx(recovered.scores.mean_nll, abs=1e-9), "scored and shipped codes are the same"
    zeros = sum(int((q.codes == 0).sum()) for n, q in shipped["codes"].items() if "layers" in n)
    assert zeros >= 0.5 * sum(q.codes.numel() for n, q in shipped["codes"].items() if "layers" in n)


def test_impossible_calibration_rules_out_the_candidate_only(
    evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.norm.weight"
    broken = {**evaluator.space.teacher_weights, name: torch.full((64,), float("nan"))}
    with pytest.raises(Infeasible, match="must be finite"):
        evaluator.space.codes(whole(GPTQ), broken)
    monkeypatch.setattr(evaluator.space, "dense_weights", lambda _candidate: broken)
    outcome = evaluator.run(Explore(whole(GPTQ)))
    assert outcome.status == "infeasible" and "must be finite" in outcome.reason


def test_latencies_are_kept_without_regard_to_the_quantizer(
    study: tuple[Path, Path], evaluator: DecoderEvaluator
) -> None:
    file = evaluator.measuring.kept_file
    assert file(whole(GPTQ)) == file(whole(INT4)) == file(whole(GPTQ, Pattern("block", 0.5)))
    assert file(whole(GPTQ)) != file(whole(replace(GPTQ, group_size=64)))
    designed = decoder_design(Workspace(*study).space, 30)
    assert not any(c.quantizer == "gptq" or c.is_sparse for c in designed)
    assert len({file(c) for c in designed}) == len(designed)


def test_studies_from_before_gptq_can_be_resumed(study: tuple[Path, Path]) -> None:
    """Their parameters have no quantizer; Optuna wants one."""

    class Old:
        def vector(self, _key: str) -> None:
            return None

        def params(self, _key: str) -> dict[str, Any]:
            return {name: value for name, value in params.items() if name != "quantizer"}

    space = Workspace(*study).space
    params = space.encode(space.baselines()[-1])
    old: Estimates = Old()  # type: ignore[assignment]
    assert frozen_trial(old, "k", distributions(space)).params == params


def test_a_candidate_that_the_engine_refuses_is_infeasible_with_op_and_layer_and_the_next_one_is_done(
    evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph asks for an operator that no engine has."""
    benchmark = {n: Measurement.exact(1.0, "ms") for n in ("decode_ms_per_token", "ttft_ms")}

    def measure(_candidate: Candidate, model: Path) -> LatencyResult:
        with EngineChild(1) as child:
            child.ask(do="load", path=str(model), threads=1)
        return LatencyResult(benchmark, True)

    def spoil(model: Any, path: Path) -> None:
        node = next(n for n in model.graph.node if n.name == "/model/layers.2/mlp/down_proj")
        node.op_type = "MatMulOfTomorrow"
        save_model(model, path)

    monkeypatch.setattr(evaluator.measuring, "measure", measure)
    with monkeypatch.context() as during:
        during.setattr(artifact, "save_model", spoil)
        refused = evaluator.run(Confirm(whole(INT4), seconds_left=60.0))
    assert refused.status == "infeasible"
    assert "at MatMulOfTomorrow of layer 2 (/model/layers.2/mlp/down_proj)" in refused.reason
    done(evaluator, Confirm(Candidate((Layer(128, 2),) * 3), seconds_left=60.0))
    done(evaluator, Confirm(whole(INT4), seconds_left=60.0))


def test_no_logits_of_a_whole_batch_are_kept(evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary is scored piece by piece, to the same NLL."""
    plain = Candidate((Layer(128, 2),) * 3)
    whole_batches = done(evaluator, Explore(plain)).scores
    seen: list[int] = []
    honest = Network.logits

    def watched(self: Network, weights: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return honest(self, weights, hidden)

    monkeypatch.setattr(Network, "logits", watched)
    monkeypatch.setattr(student, "LOGITS_AT_ONCE", 100 * 288)
    pieces = done(evaluator, Explore(plain)).scores
    assert max(seen) == 100
    assert pieces.mean_nll == pytest.approx(whole_batches.mean_nll, abs=1e-3)


def test_a_candidate_that_the_engine_refuses_does_not_end_the_fit(
    evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring, measured = evaluator.measuring, []
    pairs: list[int] = []
    designed = [whole(INT4), whole(Format()), whole(Format(8, 32))]

    @contextlib.contextmanager
    def pair() -> Iterator[int]:
        pairs.append(len(pairs))
        yield pairs[-1]

    def measure(candidate: Candidate, pair: int) -> None:
        if candidate == designed[1]:
            raise Infeasible("the engine died: signal 11", "")
        measured.append((candidate.key, pair))

    monkeypatch.setattr(measuring, "benchmark", lambda: SimpleNamespace(pair=pair))
    monkeypatch.setattr(measuring, "_measure_random", measure)
    task = Fit(tuple(designed), 60.0, seconds_left=60.0)
    while not (outcome := evaluator.run(task)).done:
        pass
    assert outcome.status == "complete" and outcome.found.refused == ("the engine died: signal 11",)
    assert [key for key, _ in measured] == [designed[0].key, designed[2].key]
    assert measured[0][1] != measured[1][1], "its child may be gone, so fresh ones were taken"


def test_damaged_measurements_are_misses(evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """One good file, and damaged ones of three kinds: the good one is read, the others are measured again."""
    measuring = evaluator.measuring
    good, *bad = (whole(INT4), whole(Format()), whole(replace(INT4, group_size=64)), whole(Format(8, 32)))
    value = Measurement(0.5, "ms", 0.4, 0.6, "measured").to_dict()
    kept = {"candidate": json.loads(good.to_json()), "decode_ms_per_token": value, "ttft_ms": value}
    files = [measuring.kept_file(c) for c in (good, *bad)]
    for file, content in zip(files, (json.dumps(kept), "", '{"candidate": 3}', '{"candidate"'), strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    measured = []
    monkeypatch.setattr(measuring, "benchmark", lambda: SimpleNamespace(pair=contextlib.nullcontext))
    monkeypatch.setattr(measuring, "_measure_random", lambda candidate, _pair: measured.append(candidate))
    task = Fit((good, *bad), 60.0, seconds_left=60.0)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        outcome = measuring.fit(task)
    assert {c.key for c in measured} == {c.key for c in bad}
    assert outcome.result is not None and outcome.found.kept == (
        {"candidate": json.loads(good.to_json()), "decode_ms_per_token": 0.5, "ttft_ms": 0.5},
    )
    for file in files:
        file.unlink()


@pytest.mark.parametrize("content", ["", "[1]", '{"decode_ms": 1.0}', '{"decode_ms": "fast", "ttft_ms": 2.0}'])
def test_a_damaged_nominal_is_learnt_again(tmp_path: Path, content: str) -> None:
    path = tmp_path / "nominal.json"
    assert _nominal(path) is None
    path.write_text(json.dumps(Nominal(0.4, 9.0, 0.01, 0.02).__dict__))
    assert _nominal(path) == Nominal(0.4, 9.0, 0.01, 0.02)
    path.write_text(content)
    with pytest.warns(RuntimeWarning, match=r"nominal\.json is damaged"):
        assert _nominal(path) is None


def test_an_elastic_student_that_is_gone_ends_the_study_with_its_name(evaluator: DecoderEvaluator) -> None:
    cut = Candidate((Layer(64, 2),) * 2)
    outcome = evaluator.run(Explore(cut))
    assert outcome.status == "fatal" and outcome.exit_code == 5
    assert str(evaluator.space.elastic_file) in outcome.reason and "another --study name" in outcome.remedy


def test_scoring_lets_go_of_the_machine_between_slices(
    evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a text is: all rows once, in order, and the lock free before each of them."""
    held: list[int] = []
    rows: list[int] = []

    @contextlib.contextmanager
    def shared(_lock: MachineLock) -> Iterator[None]:
        held.append(1)
        yield
        held.pop()

    monkeypatch.setattr(MachineLock, "shared", shared)

    def ask(**request: Any) -> dict[str, Any]:
        assert held == [1]
        rows.extend(range(request["start"], request["stop"]))
        return {}

    evaluator._score_in_slices(SimpleNamespace(ask=ask), {}, 100)  # type: ignore[arg-type]
    assert rows == list(range(100)) and held == []
