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
from paretune.compression.quantize.grid import fake_quantize
from paretune.compression.student import EMBEDDING, Network, matmul_formats
from paretune.spaces.candidate import Candidate
from paretune.teachers.batches import Batches

Weights = Mapping[str, torch.Tensor]
MOST_STORED = 2**25  # numbers of hidden states, once for the teacher and once for the student
HELD_OUT = 8  # one window in so many judges the blocks
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
    machine: Callable[[], AbstractContextManager[None]] = nullcontext,
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
    ids = _windows(tokens, recipe, weights[EMBEDDING].shape[1])
    x_teacher = teacher_weights[EMBEDDING][ids].float()
    table = weights[EMBEDDING]
    x_student = (fake_quantize(table, candidate.embedding_format) if rounding else table)[ids].float()
    errors, parts = [], segments(kept or range(len(candidate.layers)), depth)
    for i, part in enumerate(parts):
        if stop():
            break
        for j in part:
            x_teacher = _run(networks(1), _block(teacher_weights, j), x_teacher, recipe.batch, machine)
        block = _Block(networks(1), candidate, i, found, masks, rounding, recipe)
        errors.append(block.fit(x_student, x_teacher, machine))
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
        self.masks = _block(masks, index)
        self.best = _block(weights, index)
        self.parameters = {n: torch.nn.Parameter(v.detach().clone().float()) for n, v in self.best.items()}

    def fit(self, x: torch.Tensor, y: torch.Tensor, machine: Callable[[], AbstractContextManager[None]]) -> tuple[float, float]:
        """Train on all windows but the held-out ones; (error before, error after) on those. Keeps the better weights."""
        held = max(1, len(x) // HELD_OUT)
        before = self.error(self.best, x[-held:], y[-held:], machine)
        if before == 0.0:
            return before, before
        recipe, windows = self.recipe, max(1, len(x) - held)
        named = {f".layers.{n}": p for n, p in self.parameters.items()}
        optimizers = Optimizers(named, RATE * recipe.muon_lr, RATE * recipe.adamw_lr)
        generator = torch.Generator().manual_seed(recipe.seed + self.index)
        for step in range(recipe.steps):
            chosen = torch.randint(0, windows, (recipe.batch,), generator=generator)
            with machine(), torch.autocast("cpu", torch.bfloat16):
                torch.autograd.backward(relative_error(self._forward(self.parameters, x[chosen]), y[chosen]))
                optimizers.step(decay(step, step / recipe.steps, max(1, min(10, recipe.steps // 6))))
        trained = {n: p.detach() * self.masks[n] if n in self.masks else p.detach() for n, p in self.parameters.items()}
        after = self.error(trained, x[-held:], y[-held:], machine)
        if after < before:
            self.best = trained
        return before, min(before, after)

    @torch.no_grad()
    def error(
        self, block: Weights, x: torch.Tensor, y: torch.Tensor, machine: Callable[[], AbstractContextManager[None]]
    ) -> float:
        """Relative squared error of the block's output as it ships."""
        found = _batched(lambda part: self._forward(block, part), x, self.recipe.batch, machine)
        return float(relative_error(found, y))

    @torch.no_grad()
    def run(self, x: torch.Tensor, machine: Callable[[], AbstractContextManager[None]]) -> torch.Tensor:
        """What the next block gets."""
        return _batched(lambda part: self._forward(self.best, part), x, self.recipe.batch, machine)

    def named(self) -> dict[str, torch.Tensor]:
        """The better weights by their names in the student."""
        return {f"model.layers.{self.index}.{n}": value for n, value in self.best.items()}

    def _forward(self, block: Weights, x: torch.Tensor) -> torch.Tensor:
        masked = {n: v * self.masks[n] if n in self.masks else v for n, v in block.items()}
        if not self.rounding:
            return block_output(self.network, masked, x)
        forms = matmul_formats(self.alone)
        rounded = {n: fake_quantize(v, forms[k]) if (k := f"model.layers.0.{n}") in forms else v for n, v in masked.items()}
        with self.network.activations(self.alone):
            return block_output(self.network, rounded, x)


def block_output(network: Network, block: Weights, x: torch.Tensor) -> torch.Tensor:
    """Output of one decoder layer [windows, length, hidden] for the input `x` of that shape.

    `network` has depth 1; `block` are the layer's weights by their names inside the layer.
    """
    inner = {f"layers.0.{name}": value for name, value in block.items()}
    inner["norm.weight"] = torch.ones(x.shape[-1])
    with layer_outputs(network) as outputs:
        torch.func.functional_call(
            network.module.model, inner, (), {"inputs_embeds": x, "use_cache": False}, tie_weights=False
        )
    return outputs[0]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error per token over the squared norm of what is wanted, averaged over tokens; both [..., hidden]."""
    error = (found.float() - wanted).square().sum(-1)
    return (error / wanted.square().sum(-1).clamp_min(1e-12)).mean()


def _run(
    network: Network,
    block: Weights,
    x: torch.Tensor,
    batch: int,
    machine: Callable[[], AbstractContextManager[None]],
) -> torch.Tensor:
    with torch.no_grad():
        return _batched(lambda part: block_output(network, block, part), x, batch, machine)


def _batched(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    batch: int,
    machine: Callable[[], AbstractContextManager[None]],
) -> torch.Tensor:
    found = torch.empty_like(x)
    for start in range(0, len(x), batch):
        with machine(), torch.autocast("cpu", torch.bfloat16):
            found[start : start + batch] = function(x[start : start + batch])
    return found


def _block(weights: Weights, index: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer by their names inside it."""
    prefix = f"model.layers.{index}."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _windows(tokens: Any, recipe: RecoveryRecipe, hidden: int) -> torch.Tensor:
    """Token ids [windows, context] of the recipe's first batches, as many as the hidden states may fill."""
    batches = Batches(tokens, recipe.context, recipe.batch, recipe.seed)
    most = max(2, MOST_STORED // (recipe.batch * recipe.context * hidden))
    return torch.cat([batches.at(step) for step in range(min(max(2, recipe.steps), most))])
