"""Recovery block by block, for teachers that are too large to train end to end.

Each student block learns the output of the teacher's layers that it stands for, on the activations that reach it in the
compressed student; then the next one. So later blocks make up for what earlier ones left over, and no more than one block is
in training: its weights, gradients and optimizer state, and the hidden states of the text before and after it. The head is
never run. Block reconstruction under quantization: BRECQ (Li et al. 2021, arXiv 2102.05426); blocks distilled locally:
Puzzle (Bercovich et al. 2024, arXiv 2411.19146). Unlike BRECQ's, the error is plain, weighted per token by the teacher's own size.

Suggested: mild cuts, 4-bit weights and masks, 10,000 tokens or more. It hurts where a block cannot come near its target (a
deep cut): blocks that are no better on held-out windows keep their weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from paretune.compression.distill.hidden import check_hidden_widths, layer_outputs, segments
from paretune.compression.distill.optimizer import Optimizers, decay
from paretune.compression.distill.recover import RecoveryRecipe
from paretune.compression.network.student import EMBEDDING, Network, matmul_formats
from paretune.compression.quantize.grid import fake_quantize
from paretune.hardware_profiles.training_precision import autocast
from paretune.spaces.candidate import Candidate
from paretune.teachers.text.batches import Batches

Weights = Mapping[str, torch.Tensor]
Machine = Callable[[], AbstractContextManager[None]]
MOST_STORED = 2**25  # numbers of hidden states, once for the teacher and once for the student
HELD_OUT = 8  # one window in so many judges the blocks
LAYER = "model.layers.0."
RATE = 0.3  # of the recipe's learning rates: a block starts near its target


def recover_blocks(
    teacher_weights: Weights,
    weights: Weights,
    masks: Weights,
    candidate: Candidate,
    networks: Callable[[int], Network],
    depth: int,
    tokens: Any,
    recipe: RecoveryRecipe,
    machine: Machine = nullcontext,
    stop: Callable[[], bool] = lambda: False,
    *,
    kept: Sequence[int] = (),
    decide: Callable[[dict[str, torch.Tensor]], bool] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Reconstruct the candidate's blocks one after the other; arguments and result as of `recover`.

    Every block sees `recipe.tokens` tokens; `decide` is asked before the first. The facts also have "block_error_before" and
    "block_error_after": the mean relative squared error of the blocks' outputs on held-out windows. Raises ValueError if the
    hidden widths differ.
    """
    check_hidden_widths(weights[EMBEDDING].shape[1], teacher_weights[EMBEDDING].shape[1])
    start, found = time.monotonic(), {name: value.detach().clone() for name, value in weights.items()}
    rounding = recipe.uses_qat(candidate) and (decide is None or decide(found))
    ids, batch = _windows(tokens, recipe, weights[EMBEDDING].shape[1]), recipe.batch
    table = weights[EMBEDDING]
    embedded = {**found, EMBEDDING: fake_quantize(table, candidate.embedding_format) if rounding else table}
    x_teacher = first_input(networks(1), layer_alone(teacher_weights, 0), ids, batch, machine)
    x_student = first_input(networks(1), layer_alone(embedded, 0), ids, batch, machine)
    errors, parts = [], segments(kept or range(len(candidate.layers)), depth)
    for i, part in enumerate(parts):
        for j in part:
            x_teacher = _run(networks(1), layer_alone(teacher_weights, j), x_teacher, batch, machine)
        block = _Block(networks(1), candidate, i, found, masks, rounding, recipe)
        error = block.fit(x_student, x_teacher, machine, stop)
        if stop():
            break
        errors.append(error)
        found.update(block.named())
        x_student = block.run(x_student, machine)
    facts = {
        "tokens": float(recipe.steps * recipe.batch * recipe.context) * len(errors) / len(parts),
        "seconds": time.monotonic() - start,
        "loss": errors[-1][1] if errors else float("nan"),
        "qat": float(rounding),
        "block_error_before": sum(before for before, _ in errors) / max(1, len(errors)),
        "block_error_after": sum(after for _, after in errors) / max(1, len(errors)),
    }
    return found, facts


class _Block:
    """One layer of the student in training. `x` and `y` are hidden states [windows, length, hidden]."""

    def __init__(
        self,
        network: Network,
        candidate: Candidate,
        index: int,
        weights: Weights,
        masks: Weights,
        rounding: bool,
        recipe: RecoveryRecipe,
    ) -> None:
        self.network, self.index, self.rounding, self.recipe = network, index, rounding, recipe
        self.alone = Candidate((candidate.layers[index],))
        self.masks = layer_alone(masks, index)
        alone = layer_alone(weights, index)
        self.outside = {n: v for n, v in alone.items() if LAYER not in n}
        self.best = {n: v for n, v in alone.items() if LAYER in n}
        self.parameters = {n: torch.nn.Parameter(v.detach().clone().float()) for n, v in self.best.items()}

    def fit(self, x: torch.Tensor, y: torch.Tensor, machine: Machine, stop: Callable[[], bool]) -> tuple[float, float]:
        """Train on all windows but the held-out ones; (error before, error after) on those. Keeps the better weights."""
        held = max(1, len(x) // HELD_OUT)
        before = self.error(self.best, x[-held:], y[-held:], machine)
        if before == 0.0:
            return before, before
        recipe, windows = self.recipe, max(1, len(x) - held)
        optimizers = Optimizers(self.parameters, RATE * recipe.muon_lr, RATE * recipe.adamw_lr)
        generator = torch.Generator().manual_seed(recipe.seed + self.index)
        for step in range(recipe.steps):
            if stop():
                break
            chosen = torch.randint(0, windows, (recipe.batch,), generator=generator)
            with machine(), autocast():
                torch.autograd.backward(relative_error(self._forward(self.parameters, x[chosen]), y[chosen]))
                optimizers.step(decay(step, step / recipe.steps, max(1, min(10, recipe.steps // 6))))
        trained = {n: p.detach() * self.masks[n] if n in self.masks else p.detach() for n, p in self.parameters.items()}
        after = self.error(trained, x[-held:], y[-held:], machine)
        if after < before:
            self.best = trained
        return before, min(before, after)

    @torch.no_grad()
    def error(self, block: Weights, x: torch.Tensor, y: torch.Tensor, machine: Machine) -> float:
        """Relative squared error of the block's output as it ships."""
        found = _batched(lambda part: self._forward(block, part), x, self.recipe.batch, machine)
        return float(relative_error(found, y))

    @torch.no_grad()
    def run(self, x: torch.Tensor, machine: Machine) -> torch.Tensor:
        """What the next block gets."""
        return _batched(lambda part: self._forward(self.best, part), x, self.recipe.batch, machine)

    def named(self) -> dict[str, torch.Tensor]:
        """The better weights by their names in the student."""
        return {n.replace(LAYER, f"model.layers.{self.index}."): value for n, value in self.best.items()}

    def _forward(self, block: Weights, x: torch.Tensor) -> torch.Tensor:
        masked = {n: v * self.masks[n] if n in self.masks else v for n, v in block.items()}
        if not self.rounding:
            return block_output(self.network, {**self.outside, **masked}, x)
        forms = matmul_formats(self.alone)
        rounded = {n: fake_quantize(v, forms[n]) if n in forms else v for n, v in masked.items()}
        with self.network.activations(self.alone):
            return block_output(self.network, {**self.outside, **rounded}, x)


def block_output(network: Network, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Output of one decoder layer [windows, length, hidden] for the input `x` of that shape.

    `network` has depth 1, `weights` are those of `layer_alone`. What the embedding makes is replaced by `x` on its way in.
    """

    def feed(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (x, *inputs[1:])

    handle = network.layers[0].register_forward_pre_hook(feed)
    try:
        with layer_outputs(network) as outputs:
            network.hidden(weights, torch.zeros(x.shape[:2], dtype=torch.long))
    finally:
        handle.remove()
    return outputs[0]


@torch.no_grad()
def first_input(network: Network, weights: Weights, ids: torch.Tensor, batch: int, machine: Machine) -> torch.Tensor:
    """What the first layer reads for token ids [windows, length]: hidden states [windows, length, hidden] in float32."""
    found: list[torch.Tensor] = []
    handle = network.layers[0].register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].float()))
    try:
        for start in range(0, len(ids), batch):
            with machine():
                network.hidden(weights, ids[start : start + batch])
    finally:
        handle.remove()
    return torch.cat(found)


def layer_alone(weights: Weights, index: int) -> dict[str, torch.Tensor]:
    """The tensors outside the layers, and those of one layer by the names that they have in a model of depth 1."""
    prefix = f"model.layers.{index}."
    return {
        name.replace(prefix, LAYER): value
        for name, value in weights.items()
        if name.startswith(prefix) or ".layers." not in name
    }


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error per token over the squared norm of what is wanted, averaged over tokens; both [..., hidden]."""
    error = (found.float() - wanted).square().sum(-1)
    return (error / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def _run(network: Network, block: Weights, x: torch.Tensor, batch: int, machine: Machine) -> torch.Tensor:
    with torch.no_grad():
        return _batched(lambda part: block_output(network, block, part), x, batch, machine)


def _batched(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, batch: int, machine: Machine
) -> torch.Tensor:
    found = torch.empty_like(x)
    for start in range(0, len(x), batch):
        with machine(), autocast():
            found[start : start + batch] = function(x[start : start + batch])
    return found


def _windows(tokens: Any, recipe: RecoveryRecipe, hidden: int) -> torch.Tensor:
    """Token ids [windows, context] of the recipe's first batches, as many as the hidden states may fill."""
    batches = Batches(tokens, recipe.context, recipe.batch, recipe.seed)
    most = max(2, MOST_STORED // (recipe.batch * recipe.context * hidden))
    return torch.cat([batches.at(step) for step in range(min(max(2, recipe.steps), most))])
