"""Distillation: the loss against an explicit sum, training that learns, and checkpoints that continue bit for bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from paretune.compression.distill import ElasticRecipe, ElasticTrainer, RecoveryRecipe, elastic_key, recover
from paretune.compression.distill import elastic as elastic_module
from paretune.compression.distill.loss import SoftLabels, distillation_loss
from paretune.compression.distill.optimizer import decay
from paretune.compression.network.student import ATTENTION, FFN, Network, quantized_weights
from paretune.compression.prune import mask_for, slice_weights
from paretune.spaces import Candidate, Format, Layer, Pattern, Space
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.checkpoint.training_state import save_tensors
from paretune.teachers.text.tokens import TokenSplit

RECIPE = ElasticRecipe(seconds=1000.0, context=32, batch=4)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
def test_the_loss_is_the_explicit_sum(ce_weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, generator=generator) * 2, torch.randn(2, 5, 7, generator=generator) * 2
    ids = torch.randint(0, 7, (2, 5), generator=generator)
    kl = ce = 0.0
    for b in range(2):
        for t in range(5):
            s, p = [x[b, t].tolist() for x in (student, teacher)]
            zs, zp = (math.log(sum(math.exp(v) for v in row)) for row in (s, p))
            kl += sum(math.exp(v - zp) * ((v - zp) - (u - zs)) for u, v in zip(s, p, strict=True))
            if t < 4:
                ce -= s[int(ids[b, t + 1])] - zs
    expected = (1 - ce_weight) * kl / 10 + ce_weight * ce / 8
    assert float(distillation_loss(student, SoftLabels(teacher), ids, ce_weight)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(teacher, SoftLabels(teacher), ids, 0.0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_the_gradient_is_the_one_autograd_finds(ce_weight: float) -> None:
    """The hand-written backward against torch's own over the plain formula; bf16 keeps three digits of it."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (
        (torch.randn(2, 6, 11, generator=generator) * 2).requires_grad_(),
        torch.randn(2, 6, 11, generator=generator),
    )
    ids = torch.randint(0, 11, (2, 6), generator=generator)
    (mine,) = torch.autograd.grad(distillation_loss(student, SoftLabels(teacher), ids, ce_weight), student)
    log_s, p = student.log_softmax(-1), teacher.softmax(-1)
    kl = (p * (p.log() - log_s)).sum(-1).mean()
    ce = -log_s[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    (theirs,) = torch.autograd.grad((1 - ce_weight) * kl + ce_weight * ce, student)
    assert torch.allclose(mine, theirs, atol=4e-3 * float(theirs.abs().max()))
    assert not torch.allclose(mine, 0.9 * theirs, atol=4e-3 * float(theirs.abs().max())), (
        "the bar would let a wrong scale pass"
    )


def test_the_learning_rate_of_distillation_warms_up_and_decays() -> None:
    assert [decay(step, 0.0) for step in range(12)] == pytest.approx([min(1.0, (s + 1) / 10) for s in range(12)])
    assert [decay(99, p) for p in (0.0, 0.25, 0.5, 0.99, 1.0, 1.2)] == pytest.approx([1.0, 0.75, 0.5, 0.02, 0.02, 0.02])


class Bench:
    """Makes trainers over the tiny teacher."""

    def __init__(self, teacher: Teacher, space: Space, tokens: dict[str, TokenSplit]) -> None:
        self.teacher, self.space, self.tokens = teacher, space, tokens
        self.calibration = torch.from_numpy(tokens["calibration"].windows(32).ids[:8])

    def trainer(self, file: Path, **changes: Any) -> ElasticTrainer:
        return ElasticTrainer(
            self.teacher, self.space, self.tokens["train"].ids, self.calibration, replace(RECIPE, **changes), file
        )


@pytest.fixture(scope="module")
def bench(tiny_teacher: Teacher, tiny_space: Space, tiny_tokens: dict[str, TokenSplit]) -> Bench:
    return Bench(tiny_teacher, tiny_space, tiny_tokens)


def kl_of(bench: Bench, trainer: ElasticTrainer, candidate: Candidate) -> float:
    """KL to the teacher on text that training did not see."""
    ids = torch.from_numpy(bench.tokens["search"].windows(32).ids[:16])
    with torch.no_grad():
        weights = slice_weights(trainer.parameters, candidate, trainer.order, bench.teacher.shape)
        logits = trainer.network(len(candidate.layers))(weights, ids)
        return float(distillation_loss(logits, SoftLabels(trainer.network(3)(trainer.teacher_weights, ids)), ids, 0.0))


def test_waiting_for_the_machine_is_no_training(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement holds the machine for a minute: the clock of the training stands still."""
    trainer = bench.trainer(tmp_path / "elastic.safetensors", seconds=3.0)
    now = [100.0]
    monkeypatch.setattr("paretune.compression.distill.elastic.time.monotonic", lambda: now[0])

    @contextlib.contextmanager
    def machine() -> Iterator[None]:
        now[0] += 60.0
        yield

    def step() -> None:
        now[0] += 1.0
        trainer.step_count += 1

    monkeypatch.setattr(trainer, "machine", machine)
    monkeypatch.setattr(trainer, "step", step)
    while not trainer.done:
        trainer.run(10.0)
    assert trainer.step_count == 3 and trainer.elapsed == 3.0


def test_a_few_steps_bring_every_size_nearer_to_the_teacher(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path / "elastic.safetensors")
    sizes = [
        Candidate((Layer(ffn, groups),) * depth)
        for depth, ffn, groups in ((2, 32, 1), (3, 64, 2), (2, 128, 2), (3, 128, 1))
    ]
    before = [kl_of(bench, trainer, size) for size in sizes]
    for _ in range(60):
        trainer.step()
    after = [kl_of(bench, trainer, size) for size in sizes]
    assert all(math.isfinite(x) for x in (trainer.loss, *after))
    assert all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert trainer.tokens == 60 * 4 * 32


def state(trainer: ElasticTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.parameters.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_elastic_training_gives_the_uninterrupted_weights(bench: Bench, tmp_path: Path) -> None:
    whole = bench.trainer(tmp_path / "whole.safetensors")
    for _ in range(6):
        whole.step()
    file = tmp_path / "resumed.safetensors"
    for steps in (2, 3, 1):
        trainer = bench.trainer(file)
        for _ in range(steps):
            trainer.step()
        trainer.save()
    resumed = bench.trainer(file)
    assert resumed.step_count == 6
    assert resumed.order == whole.order
    assert same(state(resumed), state(whole))
    assert not same(state(whole), state(bench.trainer(tmp_path / "fresh.safetensors")))


@pytest.mark.parametrize("damage", ["torn", "noise", "another file"])
def test_a_damaged_elastic_file_is_a_miss(bench: Bench, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "elastic.safetensors"
    trainer = bench.trainer(file)
    trainer.step()
    trainer.save()
    assert bench.trainer(file).step_count == 1
    if damage == "another file":
        save_tensors(file, {"x": torch.zeros(2)}, {"order": None})
    else:
        file.write_bytes(file.read_bytes()[:1000] if damage == "torn" else b"\xff" * 4000)
    with pytest.warns(RuntimeWarning, match="is damaged and is made anew"):
        again = bench.trainer(file)
    assert again.step_count == 0 and again.elapsed == 0.0
    again.step()
    again.save()
    assert bench.trainer(file).step_count == 1


def test_forgetting_the_momentum_is_seen(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    whole = bench.trainer(tmp_path / "whole.safetensors")
    for _ in range(4):
        whole.step()
        if whole.step_count == 2:
            whole.save()
    monkeypatch.setattr(elastic_module, "restore_optimizers", lambda *_: None)
    resumed = bench.trainer(tmp_path / "whole.safetensors")
    for _ in range(2):
        resumed.step()
    assert not same(state(resumed), state(whole))


def test_training_by_time_stops_when_done_and_a_done_student_is_read_back(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer(tmp_path / "elastic.safetensors", seconds=0.3)
    progress = trainer.run(0.05)
    assert progress["tokens"] > 0
    while not trainer.done:
        trainer.run(0.2)
    again = bench.trainer(tmp_path / "elastic.safetensors", seconds=0.3)
    assert again.done
    assert same(state(again), state(trainer))
    assert again.run(5.0)["tokens"] == trainer.tokens


def test_the_elastic_key_follows_what_the_student_depends_on(tiny_teacher: Teacher, tiny_space: Space) -> None:
    def key(
        teacher: Teacher = tiny_teacher, corpus: str = "c", space: Space = tiny_space, recipe: ElasticRecipe = RECIPE
    ) -> str:
        return elastic_key(teacher, corpus, space, recipe)

    assert key() == key()
    others = [
        key(teacher=replace(tiny_teacher, digest="0" * 16)),
        key(corpus="d"),
        key(space=replace(tiny_space, min_depth=1)),
        key(space=replace(tiny_space, min_ffn=64)),
        key(space=replace(tiny_space, min_kv_groups=2)),
        key(recipe=replace(RECIPE, seconds=1.0)),
        key(recipe=replace(RECIPE, seed=1)),
        key(recipe=replace(RECIPE, batch=8)),
        key(recipe=replace(RECIPE, ce_weight=0.1)),
    ]
    assert len({key(), *others}) == 1 + len(others)
    assert key(space=replace(tiny_space, kernels=("fp32/fp32",))) == key(), "one student serves every profile"


def test_the_key_follows_the_code_that_computes_the_student() -> None:
    root = Path(elastic_module.__file__).resolve().parent.parent
    assert all((root / name).is_file() for name in elastic_module.CODE)


INT4 = Format(4, 32, "int8")
CUT = Candidate((Layer(64, 2, INT4, INT4, Pattern("2:4", 0.5)),) * 2, Format(8, 32, "int8"), Format(8, 32))


def recovered(bench: Bench, candidate: Candidate, tmp_path: Path, steps: int, qat: str) -> tuple[Any, ...]:
    trainer = bench.trainer(tmp_path / "never-saved.safetensors")
    weights = {
        name: value.detach()
        for name, value in slice_weights(trainer.parameters, candidate, trainer.order, bench.teacher.shape).items()
    }
    masks = {
        f"model.layers.{i}.{name}.weight": mask_for(weights[f"model.layers.{i}.{name}.weight"], layer.pattern, None)
        for i, layer in enumerate(candidate.layers)
        for name in (*ATTENTION, *FFN)
    }
    recipe = RecoveryRecipe(tokens=steps * 4 * 32, context=32, batch=4, qat=qat)
    found, facts = recover(
        trainer.teacher_weights, weights, masks, candidate, trainer.network, 3, bench.tokens["train"].ids, recipe
    )
    return trainer, weights, masks, found, facts


def deployed_kl(
    bench: Bench,
    trainer: ElasticTrainer,
    candidate: Candidate,
    weights: dict[str, torch.Tensor],
    masks: dict[str, torch.Tensor],
) -> float:
    """KL to the teacher of what would ship: masked, weights and activations rounded."""
    ids = torch.from_numpy(bench.tokens["search"].windows(32).ids[:16])
    network: Network = trainer.network(len(candidate.layers))
    masked = {name: value * masks[name] if name in masks else value for name, value in weights.items()}
    with torch.no_grad(), network.activations(candidate):
        logits = network(quantized_weights(masked, candidate), ids)
    with torch.no_grad():
        return float(distillation_loss(logits, SoftLabels(trainer.network(3)(trainer.teacher_weights, ids)), ids, 0.0))


@pytest.mark.parametrize("qat", ["auto", "never"])
def test_recovery_keeps_zeros_and_improves_what_ships(bench: Bench, tmp_path: Path, qat: str) -> None:
    trainer, weights, masks, found, facts = recovered(bench, CUT, tmp_path, 60, qat)
    assert found.keys() == weights.keys()
    for name, mask in masks.items():
        assert (found[name][~mask] == 0).all(), name
        assert (found[name][mask] != weights[name][mask]).any(), name
        assert (quantized_weights(found, CUT)[name][~mask] == 0).all(), name
    before, after = (deployed_kl(bench, trainer, CUT, w, masks) for w in (weights, found))
    assert after < 0.85 * before
    assert facts["tokens"] == 60 * 4 * 32
    assert facts["qat"] == float(qat == "auto")
    assert all(torch.equal(value, trainer.teacher_weights[name]) for name, value in bench.teacher.weights().items()), (
        "the teacher moved"
    )


def test_recovery_is_deterministic_and_stops_when_told(bench: Bench, tmp_path: Path) -> None:
    first, second = (recovered(bench, CUT, tmp_path, 2, "auto")[3] for _ in range(2))
    assert same(first, second)
    trainer, weights, masks, *_ = recovered(bench, CUT, tmp_path, 1, "auto")
    recipe = RecoveryRecipe(tokens=4 * 4 * 32, context=32, batch=4)
    found, facts = recover(
        trainer.teacher_weights,
        weights,
        masks,
        CUT,
        trainer.network,
        3,
        bench.tokens["train"].ids,
        recipe,
        stop=lambda: True,
    )
    assert facts["tokens"] == 0
    assert all(torch.equal(found[name], weights[name] * masks.get(name, torch.tensor(True))) for name in weights)


@pytest.mark.parametrize(
    ("form", "other", "auto", "always"),
    [
        (Format(4, 32), Format(), True, True),
        (Format(), Format(4, 32), True, True),
        (Format(8, 32), Format(8, 32), False, True),
        (Format(), Format(), False, False),
    ],
)
def test_training_sees_the_rounding_only_where_a_layer_has_four_bits(
    form: Format, other: Format, auto: bool, always: bool
) -> None:
    candidate = Candidate((Layer(64, 1, form, other),) * 2)
    assert RecoveryRecipe(1).uses_qat(candidate) is auto
    assert RecoveryRecipe(1, qat="always").uses_qat(candidate) is always
    assert RecoveryRecipe(1, qat="never").uses_qat(candidate) is False


def test_what_gptq_will_round_is_trained_without_rounding() -> None:
    calibrated = replace(INT4, algorithm="gptq")
    for candidate in (
        Candidate((Layer(64, 1, calibrated, calibrated),) * 2),
        Candidate((Layer(64, 1, INT4, calibrated),) * 2),
        Candidate((Layer(64, 1, INT4, INT4),) * 2, calibrated, Format(8, 32)),
    ):
        assert not any(RecoveryRecipe(1, qat=qat).uses_qat(candidate) for qat in ("auto", "always", "never"))


def test_a_four_bit_head_alone_is_no_reason_for_rounding_in_training() -> None:
    candidate = Candidate((Layer(64, 1),) * 2, Format(4, 32), Format(4, 32))
    assert RecoveryRecipe(1).uses_qat(candidate) is False
    assert RecoveryRecipe(1, qat="always").uses_qat(candidate) is True
