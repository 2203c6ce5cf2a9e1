"""Cuts of the residual stream: sorted once, sliced as prefixes, trained, searched, shipped; transformers is the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paretune.compression.distill import ElasticRecipe, ElasticTrainer
from paretune.compression.distill.elastic import order_of
from paretune.compression.distill.loss import SoftLabels, distillation_loss
from paretune.compression.export.artifact import genai_config, write_artifact
from paretune.compression.network.student import (
    EMBEDDING,
    HEAD,
    Network,
    quantized_weights,
    student_config,
    student_family,
)
from paretune.compression.prune import Importance, importance, layer_statistics, slice_weights, sort_by_importance
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.latency.benchmark import LatencyResult
from paretune.objectives.measurement import Measurement
from paretune.objectives.prediction.latency_fit import features
from paretune.search.estimation.calibration import Calibration, Pair
from paretune.search.evaluators.decoder import DecoderEvaluator
from paretune.search.prepare.ready import Ready
from paretune.search.prepare.studies import create_study
from paretune.search.spec import Spec
from paretune.search.tasks.base import Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.elastic import Elastic
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.recover import Recover
from paretune.spaces import Candidate, Format, Layer, Pattern, Space
from paretune.teachers.checkpoint.families import axis_sizes, family_of
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.teachers.text.tokens import TokenSplit
from support.decoders import decoder_design
from support.plans import empty_plan

KERNELS = ("fp32/fp32", "int8/int8", "int4/int8", "int4/fp32")
INT4 = Format(4, 32, "fp32")
WIDTH = 32
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied": {"tie_word_embeddings": False, "head_dim": 32},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def teacher(
    request: pytest.FixtureRequest, write_teacher: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Teacher:
    folder = write_teacher(tmp_path_factory.mktemp("teacher") / "model", rms_norm_eps=1e-3, **VARIANTS[request.param])
    return load_teacher(str(folder))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 288, (3, 40), generator=torch.Generator().manual_seed(0))


def network_of(teacher: Teacher, depth: int = 3) -> Network:
    return Network(teacher.config, teacher.shape, depth)


def sorted_teacher(teacher: Teacher, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], Importance]:
    weights = teacher.weights()
    order = importance(layer_statistics(network_of(teacher), weights, ids), teacher.shape, hidden=True)
    return sort_by_importance(weights, order, teacher.shape), order


def narrow(form: Format = Format(), hidden: int = WIDTH) -> Candidate:  # noqa: B008 (frozen)
    return Candidate((Layer(96, 1, form, form),) * 2, form, form, hidden)


def test_channels_are_ranked_by_what_transformers_own_norms_put_out(teacher: Teacher, ids: torch.Tensor) -> None:
    from transformers import AutoModelForCausalLM

    model, squares = AutoModelForCausalLM.from_pretrained(teacher.folder), dict[str, torch.Tensor]()
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_hook(lambda _m, _i, out, name=name: squares.__setitem__(name, out))
    with torch.no_grad():
        model(ids)
    assert len(squares) == 2 * teacher.shape.layers
    score = [0.0] * teacher.shape.hidden
    for found in squares.values():
        for j in range(teacher.shape.hidden):
            score[j] += float(sum(v * v for v in found[..., j].double().flatten().tolist())) ** 0.5
    order = sorted_teacher(teacher, ids)[1].hidden
    assert sorted(order) == list(range(teacher.shape.hidden))
    assert all(score[a] >= score[b] - 1e-3 for a, b in itertools.pairwise(order))
    assert order != tuple(range(teacher.shape.hidden))
    assert importance(layer_statistics(network_of(teacher), teacher.weights(), ids), teacher.shape).hidden == ()


def test_sorting_the_channels_leaves_the_logits_unchanged(teacher: Teacher, ids: torch.Tensor) -> None:
    weights, (ordered, order) = teacher.weights(), sorted_teacher(teacher, ids)
    network = network_of(teacher)
    with torch.no_grad():
        before = network(weights, ids)
        assert (network(ordered, ids) - before).abs().max() <= 1e-5 * float(before.abs().max())
        for name in (
            EMBEDDING,
            "model.norm.weight",
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.2.self_attn.o_proj.weight",
        ):
            forgotten = {**ordered, name: sort_by_importance(weights, replace(order, hidden=()), teacher.shape)[name]}
            assert (network(forgotten, ids) - before).abs().max() > 1e-2, f"control: {name} was forgotten"


def test_a_narrow_student_is_the_transformers_model_of_its_config(teacher: Teacher, ids: torch.Tensor) -> None:
    """The oracle takes the tensors by explicit indices from the unsorted teacher."""
    weights, (ordered, order) = teacher.weights(), sorted_teacher(teacher, ids)
    shape, candidate = teacher.shape, narrow()
    student = slice_weights(ordered, candidate, order, shape)
    by_hand = {n: value[..., list(order.hidden[:WIDTH])] for n, value in weights.items() if ".layers." not in n}
    sizes = axis_sizes(shape, 96, 1, WIDTH)
    for new, old in enumerate(order.kept_layers(2)):
        span = {
            "hidden": list(order.hidden),
            "ffn": list(order.ffn[old]),
            "head": list(range(shape.head_dim)),
            "kv": [g * shape.head_dim + i for g in order.groups[old] for i in range(shape.head_dim)],
            "query": [
                g * shape.heads_per_group * shape.head_dim + i
                for g in order.groups[old]
                for i in range(shape.heads_per_group * shape.head_dim)
            ],
        }
        for name, axes in family_of(shape).layer_tensors.items():
            value = weights[f"model.layers.{old}.{name}"]
            for dimension, axis in enumerate(axes):
                value = value.index_select(dimension, torch.tensor(span[axis][: sizes[axis]]))
            by_hand[f"model.layers.{new}.{name}"] = value
    assert student.keys() == by_hand.keys()
    assert all(torch.equal(student[name], by_hand[name]) for name in student)
    config = student_config(teacher.config, candidate, shape)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (WIDTH, 96, 2)
    model = student_family(candidate, shape).model_class(config).eval()
    missing = model.load_state_dict({name: value.clone() for name, value in student.items()}, strict=False)
    assert missing.missing_keys == ([HEAD] if shape.tied else []) and not missing.unexpected_keys
    if shape.tied:
        model.tie_weights()
    with torch.no_grad():
        found, expected = network_of(teacher, 2)(student, ids), model(ids).logits
        assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        other = slice_weights(ordered, replace(candidate, hidden=48), order, shape)
        assert (network_of(teacher, 2)(other, ids) - expected).abs().max() > 1e-2, "control: another width"


def test_widths_are_nested_and_a_prefix_is_not_the_wide_model_with_zeros(teacher: Teacher, ids: torch.Tensor) -> None:
    """RMS norm over fewer channels divides by another mean square: what a slice computes has to be trained."""
    ordered, order = sorted_teacher(teacher, ids)
    small, large = (slice_weights(ordered, narrow(hidden=width), order, teacher.shape) for width in (32, 48))
    for name, value in small.items():
        assert torch.equal(value, large[name][tuple(slice(0, n) for n in value.shape)]), name
        assert value.untyped_storage().data_ptr() == large[name].untyped_storage().data_ptr(), "a view"
    zeroed = dict(large)
    axes: dict[str, tuple[int, ...]] = {EMBEDDING: (1,), HEAD: (1,), "model.norm.weight": (0,)}
    for name, kinds in family_of(teacher.shape).layer_tensors.items():
        axes |= {f"model.layers.{i}.{name}": tuple(d for d, a in enumerate(kinds) if a == "hidden") for i in range(2)}
    for name, value in large.items():
        mask = torch.ones_like(value)
        for dimension in axes[name]:
            mask.narrow(dimension, WIDTH, 48 - WIDTH).zero_()
        zeroed[name] = value * mask
    network = network_of(teacher, 2)
    with torch.no_grad():
        assert (network(zeroed, ids) - network(small, ids)).abs().max() > 1e-2


def test_a_narrow_student_streams_from_its_artifact(teacher: Teacher, ids: torch.Tensor, tmp_path: Path) -> None:
    """onnxruntime-genai against greedy decoding in torch; the parity of the logits is in test_export_parity.py."""
    import onnxruntime_genai as genai

    ordered, order = sorted_teacher(teacher, ids)
    candidate = narrow(INT4, 48).canonical(teacher.shape)
    assert {candidate.head_format.group_size, candidate.layers[0].ffn_format.group_size} == {16}
    weights = slice_weights(ordered, candidate, order, teacher.shape)
    write_artifact(tmp_path / "artifact", teacher, candidate, weights, {})
    assert genai_config(teacher, candidate)["model"]["decoder"]["hidden_size"] == 48
    network, expected, margin = network_of(teacher, 2), [17, 5, 200, 33, 90], float("inf")
    while len(expected) < 24 and expected[-1] != teacher.end_token:
        with torch.no_grad():
            logits = network(quantized_weights(weights, candidate), torch.tensor([expected]))[0, -1]
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        expected.append(int(logits.argmax()))
    assert len(expected) > 10 and margin > 1e-3, "a short or tied text would show nothing"
    model = genai.Model(str(tmp_path / "artifact" / "onnx"))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=24, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([expected[:5]], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == expected


RECIPE = ElasticRecipe(seconds=1000.0, context=32, batch=4)


def trainer_of(teacher: Teacher, tokens: dict[str, TokenSplit], file: Path, hidden: bool) -> ElasticTrainer:
    space = Space.of(teacher.shape, KERNELS, hidden=hidden)
    calibration = torch.from_numpy(tokens["calibration"].windows(32).ids[:8])
    return ElasticTrainer(teacher, space, tokens["train"].ids, calibration, RECIPE, file)


def test_training_draws_every_width_and_the_teachers_every_other_time(
    tiny_teacher: Teacher, tiny_tokens: dict[str, TokenSplit], tmp_path: Path
) -> None:
    with_hidden, without = (
        trainer_of(tiny_teacher, tiny_tokens, tmp_path / f"{hidden}.safetensors", hidden) for hidden in (True, False)
    )
    generator = torch.Generator().manual_seed(5)
    drawn = [c.width(tiny_teacher.shape) for _ in range(400) for c in with_hidden._students(generator)]
    assert set(drawn) == set(with_hidden.space.hidden_widths) == {32, 64}
    assert 0.4 < drawn.count(64) / len(drawn) < 0.6  # 0.475 expected; the seed is fixed
    generator = torch.Generator().manual_seed(5)
    assert {c.width(tiny_teacher.shape) for _ in range(50) for c in without._students(generator)} == {64}
    assert without.order.hidden == () and len(with_hidden.order.hidden) == 64
    smallest = replace(with_hidden.recipe, smallest_share=1.0)
    with_hidden.recipe = smallest
    least = with_hidden._students(generator)[0]
    assert (len(least.layers), least.layers[0], least.hidden) == (2, Layer(32, 1), 32)


def test_a_few_steps_bring_the_narrow_students_nearer_to_the_teacher_and_resume(
    tiny_teacher: Teacher, tiny_tokens: dict[str, TokenSplit], tmp_path: Path
) -> None:
    file = tmp_path / "elastic.safetensors"
    trainer = trainer_of(tiny_teacher, tiny_tokens, file, hidden=True)
    held_out = torch.from_numpy(tiny_tokens["search"].windows(32).ids[:16])
    sizes = [Candidate((Layer(128, 2),) * 3, hidden=32), Candidate((Layer(96, 1),) * 2, hidden=32)]

    def kl(candidate: Candidate) -> float:
        weights = slice_weights(trainer.parameters, candidate, trainer.order, tiny_teacher.shape)
        with torch.no_grad():
            target = SoftLabels(trainer.network(3)(trainer.teacher_weights, held_out))
            logits = trainer.network(len(candidate.layers))(weights, held_out)
            return float(distillation_loss(logits, target, held_out, 0.0))

    before = [kl(size) for size in sizes]
    for _ in range(40):
        trainer.step()
    assert all(kl(size) < 0.9 * was for size, was in zip(sizes, before, strict=True))
    trainer.save()
    again = trainer_of(tiny_teacher, tiny_tokens, file, hidden=True)
    assert again.order == trainer.order and again.order.hidden
    assert all(torch.equal(again.parameters[n], value) for n, value in trainer.parameters.items())
    assert order_of({"order": {"ffn": [[1, 0]], "groups": [[0]], "layers": [0]}}).hidden == (), "an older file"


def test_a_narrower_stream_costs_less_by_the_fit_and_counts_as_cut(tiny_teacher: Teacher) -> None:
    shape = tiny_teacher.shape
    whole, cut = Candidate((Layer(128, 2),) * 3), Candidate((Layer(128, 2),) * 3, hidden=32)
    full, half = features(whole, shape), features(cut, shape)
    assert half[2:12] == pytest.approx(full[2:12] / 2)
    assert (half[:2] == full[:2]).all() and half[12] == full[12], "as many layers, the same cache"
    weights = {"dense": 2 * 64 * (64 + 32) + 3 * 64 * 128}
    assert full[2] == pytest.approx(3 * weights["dense"] / 1e6)
    space = Space.of(shape, KERNELS, hidden=True)
    assert {c.width(shape) for c in decoder_design(space, 24)} == {32, 64}, "the fit measures narrow students too"
    pairs = [Pair(c, 0.5, 0.5 - gain) for c, gain in ((whole, 0.0), (cut, 0.3)) for _ in range(4)]
    learned = Calibration(shape, pairs)
    assert learned.estimate(cut, 0.5) < learned.estimate(whole, 0.5) - 0.1, "recovery repairs cuts"


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, tiny_text: Path) -> DecoderEvaluator:
    home = tmp_path_factory.mktemp("home")
    spec = Spec.model_validate(
        {
            "teacher": str(tiny_teacher_dir),
            "data": str(tiny_text),
            "budget": "60s",
            "search_tokens": 4000,
            "hidden": True,
            "shares": {"elastic": 0.02},
        }
    )
    teacher, profile = load_teacher(spec.teacher), detected_profile()
    space = Space.of(teacher.shape, profile.weight_formats, hidden=True)
    plan = empty_plan(space, spec)
    create_study(Ready(spec, teacher, profile, space, plan), home, "s", "paretune search").close()
    return DecoderEvaluator(home / "studies" / "s", home)


def test_a_narrow_candidate_goes_from_the_elastic_student_to_its_artifact(
    evaluator: DecoderEvaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(task: Task) -> Any:
        outcome = evaluator.run(task)
        while outcome.status == "complete" and not outcome.done:
            outcome = evaluator.run(task)
        assert outcome.status == "complete", outcome.reason
        return outcome.result

    done(Elastic(seconds_left=60.0))
    benchmark = {n: Measurement.exact(1.0, "ms") for n in ("decode_ms_per_token", "ttft_ms")}
    monkeypatch.setattr(evaluator.measuring, "measure", lambda *_: LatencyResult(benchmark, True))
    shape = evaluator.space.teacher.shape
    whole, pattern = Candidate((Layer(128, 2),) * 3), Pattern("2:4", 0.5, "wanda")
    candidate = Candidate((Layer(128, 2, INT4, INT4, pattern),) * 3, INT4, Format(8, 32), 32).canonical(shape)
    done(Confirm(whole, seconds_left=60.0))
    rung0, wide = done(Explore(candidate)), done(Explore(replace(candidate, hidden=0)))
    assert rung0.measurements["bytes"].value < 0.7 * wide.measurements["bytes"].value, "it physically shrinks"
    recovered = done(Recover(candidate, tokens=4096, seconds_left=60.0))
    confirmed = done(Confirm(candidate, recovered.recovered, seconds_left=60.0))
    assert confirmed.measurements["bytes"].value == pytest.approx(rung0.measurements["bytes"].value, rel=1e-3)
    assert evaluator.measuring.kept_file(candidate) != evaluator.measuring.kept_file(replace(candidate, hidden=0))
