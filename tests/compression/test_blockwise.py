"""Hidden states: matched, mapped, refused; and recovery block by block on a small model that has learned something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from paretune.compression.distill import RecoveryRecipe, recover, recover_blocks
from paretune.compression.distill.blockwise import block_output, layer_alone, relative_error
from paretune.compression.distill.hidden import hidden_loss, layer_outputs, segments
from paretune.compression.network.student import Network, quantized_weights
from paretune.compression.prune import importance, layer_statistics, slice_weights, sort_by_importance
from paretune.spaces import Candidate, Format, Layer
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.tokens import TokenSplit

Weights = dict[str, torch.Tensor]
INT4 = Format(4, 32, "fp32")
CUT = Candidate((Layer(96, 2, INT4, INT4),) * 2, INT4, Format(8, 32))


def test_layers_stand_for_themselves_and_the_dropped_ones_behind_them() -> None:
    assert segments([0, 2, 3, 5], 6) == [range(2), range(2, 3), range(3, 5), range(5, 6)]
    assert segments([0], 4) == [range(4)]
    for bad in ([1, 2], [0, 2, 2], [0, 3, 1], [0, 6], []):
        with pytest.raises(ValueError, match="must ascend from 0"):
            segments(bad, 6)


def test_the_hidden_loss_is_the_explicit_sum_and_knows_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, 3, 8, generator=generator) for _ in range(2)] for _ in range(2))
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for a, b in zip(s.flatten(0, 1), t.flatten(0, 1), strict=True):
            a, b = a / a.square().mean().sqrt(), b / b.square().mean().sqrt()
            total += float(((a - b) ** 2).sum())
    assert float(hidden_loss(student, teacher)) == pytest.approx(total / (2 * 6 * 8), rel=1e-5)
    assert float(hidden_loss([3 * t for t in teacher], teacher)) == pytest.approx(0.0, abs=1e-10)
    assert float(hidden_loss([-t for t in teacher], teacher)) == pytest.approx(4.0, rel=1e-5)
    with pytest.raises(ValueError, match="a teacher's layer for each of 1"):
        hidden_loss(student[:1], teacher)


@dataclass(frozen=True)
class Trained:
    """A small model after some training, sorted by importance, and the text."""

    teacher: Teacher
    weights: Weights
    student: Weights
    kept: list[int]
    networks: Callable[[int], Network]
    train: torch.Tensor
    held_out: torch.Tensor

    def nll(self, candidate: Candidate, weights: Weights) -> float:
        """Of what would ship, on text that no training saw."""
        with torch.no_grad():
            network = self.networks(len(candidate.layers))
            logits = network(quantized_weights(weights, candidate), self.held_out)[:, :-1]
            return float(F.cross_entropy(logits.flatten(0, 1), self.held_out[:, 1:].flatten()))


@pytest.fixture(scope="module")
def trained(
    tiny_teacher: Teacher, tiny_tokens: dict[str, TokenSplit], learned_weights: Callable[[str], Weights]
) -> Trained:
    made: dict[int, Network] = {}

    def networks(depth: int) -> Network:
        return made.setdefault(depth, Network(tiny_teacher.config, tiny_teacher.shape, depth))

    train, weights = torch.as_tensor(tiny_tokens["train"].ids[:].astype("int64")), learned_weights("three")
    calibration = torch.from_numpy(tiny_tokens["calibration"].windows(64).ids[:16])
    order = importance(layer_statistics(networks(3), weights, calibration), tiny_teacher.shape)
    weights = sort_by_importance(weights, order, tiny_teacher.shape)
    student = slice_weights(weights, CUT, order, tiny_teacher.shape)
    held_out = torch.from_numpy(tiny_tokens["search"].windows(64).ids[:48])
    return Trained(tiny_teacher, weights, student, order.kept_layers(2), networks, train, held_out)


def test_the_small_model_has_learned_something(trained: Trained) -> None:
    plain = Candidate((Layer(128, 2),) * 3)
    assert trained.nll(plain, trained.weights) < 0.6 * trained.nll(plain, trained.teacher.weights())
    assert trained.nll(CUT, trained.student) > trained.nll(plain, trained.weights) + 0.1


def test_a_block_alone_gives_what_it_gives_in_the_model(trained: Trained) -> None:
    network = trained.networks(3)
    with torch.no_grad(), layer_outputs(network) as outputs:
        network(trained.weights, trained.held_out[:2])
        inputs = [trained.weights["model.embed_tokens.weight"][trained.held_out[:2]], *outputs]
    for i in range(3):
        block, name = layer_alone(trained.weights, i), "model.layers.0.mlp.up_proj.weight"
        with torch.no_grad():
            found = block_output(trained.networks(1), block, inputs[i])
            moved = {**block, name: block[name].clone()}
            moved[name][0, 0] += 0.5
            other = block_output(trained.networks(1), moved, inputs[i])
        assert torch.allclose(found, inputs[i + 1], atol=1e-5)
        assert not torch.allclose(other, inputs[i + 1], atol=1e-5), "one weight moved must be seen"


RECIPE = RecoveryRecipe(tokens=100 * 4 * 64, context=64, batch=4)


def by_blocks(
    trained: Trained, recipe: RecoveryRecipe = RECIPE, masks: Weights | None = None, **options: Any
) -> tuple[Weights, dict[str, float]]:
    return recover_blocks(
        trained.weights,
        trained.student,
        masks or {},
        CUT,
        trained.networks,
        3,
        trained.train,
        recipe,
        kept=trained.kept,
        **options,
    )


def test_block_by_block_lowers_the_error_and_the_nll_after_a_cut_and_int4(trained: Trained) -> None:
    before = trained.nll(CUT, trained.student)
    found, facts = by_blocks(trained)
    assert facts["qat"] == 1.0 and facts["tokens"] == RECIPE.tokens
    assert facts["block_error_after"] < 0.8 * facts["block_error_before"]
    lost = before - trained.nll(Candidate((Layer(128, 2),) * 3), trained.weights)
    assert before - trained.nll(CUT, found) > 0.2 * lost, (before, trained.nll(CUT, found))
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(found[name], trained.student[name]), "only blocks are trained"
    again, _ = by_blocks(trained)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_the_wrong_target_does_not_help(trained: Trained) -> None:
    """Negative control of the test above: learn the outputs of a teacher whose layers are another model's."""
    other = {n: torch.roll(w, 7, 0) if ".layers." in n and w.ndim == 2 else w for n, w in trained.weights.items()}
    found, _ = recover_blocks(
        other, trained.student, {}, CUT, trained.networks, 3, trained.train, RECIPE, kept=trained.kept
    )
    assert trained.nll(CUT, found) > trained.nll(CUT, trained.student)


def test_block_by_block_keeps_zeros_asks_once_and_stops(trained: Trained) -> None:
    masks = {
        n: torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        for n, w in trained.student.items()
        if "mlp" in n
    }
    masked = {n: w * masks[n] if n in masks else w for n, w in trained.student.items()}
    asked: list[int] = []

    def no(weights: Weights) -> bool:
        asked.append(len(weights))
        return False

    short = replace(RECIPE, tokens=10 * 4 * 64)
    found, facts = by_blocks(replace(trained, student=masked), short, masks, decide=no)
    assert asked == [len(masked)] and facts["qat"] == 0.0
    assert all((found[name][~mask] == 0).all() for name, mask in masks.items())
    ended, facts = by_blocks(trained, short, stop=lambda: True)
    assert facts["tokens"] == 0.0 and all(torch.equal(ended[n], trained.student[n]) for n in ended)


def test_relative_error_is_per_token() -> None:
    wanted = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    assert float(relative_error(torch.zeros(2, 2), wanted)) == pytest.approx(1.0)
    assert float(relative_error(wanted + torch.tensor([[5.0, 0.0], [0.0, 0.0]]), wanted)) == pytest.approx(0.5)


def narrow(trained: Trained) -> Weights:
    """A student of half the hidden width; its shapes suffice to be refused."""
    return {n: w[..., : w.shape[-1] // 2] for n, w in trained.student.items()}


def test_another_hidden_width_is_refused_with_rule_value_and_remedy(trained: Trained) -> None:
    said = "same hidden width only, but the student has 32 and the teacher 64; set recovery.hidden_weight to 0"
    masks: Weights = {}
    arguments = (trained.weights, narrow(trained), masks, CUT, trained.networks, 3, trained.train)
    with pytest.raises(ValueError, match=said):
        recover(*arguments, replace(RECIPE, hidden_weight=1.0), kept=trained.kept)
    with pytest.raises(ValueError, match="the student has 32 and the teacher 64"):
        recover_blocks(*arguments, RECIPE, kept=trained.kept)


def distance(trained: Trained, weights: Weights) -> float:
    """Hidden loss of the student on held-out text."""
    with torch.no_grad(), layer_outputs(trained.networks(3)) as teacher:
        trained.networks(3)(trained.weights, trained.held_out)
        targets = [teacher[part[-1]] for part in segments(trained.kept, 3)]
    with torch.no_grad(), layer_outputs(trained.networks(2)) as student:
        trained.networks(2)(weights, trained.held_out)
        return float(hidden_loss(student, targets))


def test_matching_hidden_states_brings_them_nearer_than_the_logits_alone(trained: Trained, tmp_path: Path) -> None:
    short = replace(RECIPE, tokens=25 * 4 * 64, qat="never")
    found = [
        recover(
            trained.weights,
            trained.student,
            {},
            CUT,
            trained.networks,
            3,
            trained.train,
            replace(short, hidden_weight=weight),
            kept=trained.kept,
        )[0]
        for weight in (0.0, 3.0)
    ]
    without, matched = (distance(trained, weights) for weights in found)
    assert matched < 0.9 * without
    assert matched < distance(trained, trained.student)
