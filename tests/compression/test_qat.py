"""Training under the rounding: the exported integers are the ones that training computed with, and who asks for it when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from paretune.compression.distill import LabelCache, RecoveryRecipe, recover
from paretune.compression.export.artifact import write_artifact
from paretune.compression.network.student import Network, matmul_formats, quantized_weights
from paretune.compression.quantize import quantize
from paretune.spaces import Candidate, Format, Layer
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.tokens import TokenSplit

Weights = dict[str, torch.Tensor]
INT4 = Format(4, 32, "int8")
CANDIDATE = Candidate((Layer(128, 2, INT4, INT4),) * 3, INT4, Format(8, 32))
STEPS = 12
RECIPE = RecoveryRecipe(tokens=STEPS * 4 * 32, context=32, batch=4)


@pytest.fixture(scope="module")
def networks(tiny_teacher: Teacher) -> Callable[[int], Network]:
    made: dict[int, Network] = {}
    return lambda depth: made.setdefault(depth, Network(tiny_teacher.config, tiny_teacher.shape, depth))


class Training:
    """Recoveries of the teacher itself at 4 bits, with every set of weights that a forward pass of training computed with."""

    def __init__(
        self, teacher: Teacher, networks: Callable[[int], Network], tokens: Any, monkeypatch: pytest.MonkeyPatch
    ):
        self.teacher, self.networks, self.tokens, self.monkeypatch = teacher, networks, tokens, monkeypatch
        self.seen: list[Weights] = []

    def run(
        self, recipe: RecoveryRecipe = RECIPE, steps: int = STEPS, **options: Any
    ) -> tuple[Weights, dict[str, float]]:
        self.seen.clear()
        network, calls = self.networks(3), iter(range(10**6))
        teacher = self.teacher.weights()

        class Spied:
            """The student's network; the teacher's passes go through it too and are told apart by their weights."""

            activations, layers, module = network.activations, network.layers, network.module

            def __call__(spied, weights: Weights, ids: torch.Tensor) -> torch.Tensor:
                if weights is not teacher:
                    self.seen.append({n: w.detach().clone() for n, w in weights.items()})
                return network(weights, ids)

        spied: Any = Spied()
        return recover(
            teacher,
            teacher,
            {},
            CANDIDATE,
            lambda _depth: spied,
            3,
            self.tokens,
            recipe,
            stop=lambda: next(calls) >= steps,
            **options,
        )


@pytest.fixture
def training(
    tiny_teacher: Teacher,
    networks: Callable[[int], Network],
    tiny_tokens: dict[str, TokenSplit],
    monkeypatch: pytest.MonkeyPatch,
) -> Training:
    return Training(tiny_teacher, networks, tiny_tokens["train"].ids, monkeypatch)


def shipped(path: Path) -> dict[str, np.ndarray]:
    """Codes of every MatMulNBits of a file: node name to [N, K]."""
    model = onnx.load(path)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            data = tensors[node.input[1]]
            data = np.stack([data & 15, data >> 4], -1) if facts["bits"] == 4 else data
            found[node.name] = data.reshape(facts["N"], facts["K"]).astype(int) - 2 ** (facts["bits"] - 1)
    return found


def codes_of(weights: Weights, candidate: Candidate) -> dict[str, torch.Tensor]:
    forms = matmul_formats(candidate)
    return {n: quantize(w, forms[n]).dequantize() for n, w in weights.items() if n in forms}


def test_the_integers_that_ship_are_those_that_training_computed_with(training: Training, tmp_path: Path) -> None:
    """Stopped before its last step, recovery returns the weights that the last step of the whole run computes with."""
    training.run()
    last = training.seen[-1]
    found, _ = training.run(steps=STEPS - 1)
    exported = codes_of(found, CANDIDATE)
    assert len(exported) == 21 and all(torch.equal(value, last[name]) for name, value in exported.items())
    folder = tmp_path / "artifact"
    write_artifact(folder, training.teacher, CANDIDATE, found, {"key": CANDIDATE.key})
    codes = shipped(folder / "onnx" / "model.onnx")
    forms = matmul_formats(CANDIDATE)
    for i in range(3):
        for node, name in (("attn/o_proj", "self_attn.o_proj"), ("mlp/down_proj", "mlp.down_proj")):
            full = f"model.layers.{i}.{name}.weight"
            scales = quantize(found[full], forms[full]).scales.repeat_interleave(32, 1)
            assert torch.equal(torch.from_numpy(codes[f"/model/layers.{i}/{node}"]).float() * scales, last[full])
    # controls: one weight moved by a step, another grid, the weights from before
    moved = {n: w.clone() for n, w in found.items()}
    name = "model.layers.1.mlp.down_proj.weight"
    grid = quantize(found[name], INT4)
    row, column = (grid.codes.abs() < 4).nonzero()[0].tolist()  # away from the ends of the grid
    moved[name][row, column] += grid.scales[row, column // 32]
    coarser = quantize(found[name], Format(8, 32)).dequantize()
    for other in (codes_of(moved, CANDIDATE)[name], coarser, codes_of(training.teacher.weights(), CANDIDATE)[name]):
        assert not torch.equal(other, last[name])


def test_without_rounding_training_computes_with_other_numbers(training: Training) -> None:
    """The control of the test above: what post-training quantization ships, no step has seen."""
    training.run(replace(RECIPE, qat="never"))
    last = training.seen[-1]
    found, facts = training.run(replace(RECIPE, qat="never"), steps=STEPS - 1)
    assert facts["qat"] == 0.0
    assert not any(torch.equal(value, last[name]) for name, value in codes_of(found, CANDIDATE).items())


@pytest.mark.parametrize(("answer", "share"), [(True, 0.5), (False, 0.5), (True, 0.0), (True, 1.0)])
def test_the_question_comes_once_after_its_share_of_the_steps(training: Training, answer: bool, share: float) -> None:
    asked: list[int] = []

    def decide(weights: Weights) -> bool:
        asked.append(len(training.seen))
        assert training.seen == [] or not torch.equal(
            weights["model.norm.weight"], training.seen[-1]["model.norm.weight"]
        )
        return answer

    _, facts = training.run(replace(RECIPE, ptq_share=share), decide=decide)
    expected = min(round(STEPS * share), STEPS - 1)
    assert asked == [expected] and facts["qat"] == float(answer)
    rounded = [
        "lm_head.weight" in weights for weights in training.seen
    ]  # a tied head is a tensor of its own once rounded
    assert rounded == [False] * expected + [answer] * (STEPS - expected)


def test_kept_labels_change_nothing_from_one_recovery_to_the_next(training: Training, tmp_path: Path) -> None:
    first, second = (LabelCache(tmp_path, ("t",), 32) for _ in range(2))
    one, _ = training.run(cache=first)
    two, _ = training.run(cache=second)
    assert (first.hits, first.misses, second.hits, second.misses) == (0, STEPS, STEPS, 0)
    assert all(torch.equal(one[name], two[name]) for name in one)
    without, _ = training.run()
    assert not all(torch.equal(one[name], without[name]) for name in one), "the cut labels are others, if only slightly"


def test_quantized_weights_are_what_the_codes_say(training: Training) -> None:
    found, _ = training.run(steps=2)
    effective = quantized_weights(found, CANDIDATE)
    assert all(torch.equal(effective[name], value) for name, value in codes_of(found, CANDIDATE).items())
