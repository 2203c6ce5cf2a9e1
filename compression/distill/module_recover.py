"""Recovery of any module: distil it from the teacher's outputs under its mask and its fake-quant."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from paretune.compression.calibration.modules import Matrix, effective_weights
from paretune.compression.distill.optimizer import decay
from paretune.spaces.candidate import Format
from paretune.teachers.plugins.plugin import Batch, Forwarding, Outputs

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class ModuleRecipe:
    """`examples` of distillation with AdamW at `lr`, warmed up and decayed linearly; gradients clipped at norm 1."""

    examples: int
    lr: float = 1e-3
    seed: int = 1


def distillation_loss(kind: str, student: Outputs, teacher: Outputs) -> torch.Tensor:
    """Mean over the outputs: "mse" relative to the teacher's variance (1: as bad as its mean), or "kl" over the last
    dimension in nats (Hinton et al. 2015, temperature 1)."""
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        if kind == "kl":
            target = F.log_softmax(theirs.float(), -1).flatten(0, -2)
            own = F.log_softmax(mine.float(), -1).flatten(0, -2)
            losses.append(F.kl_div(own, target, reduction="batchmean", log_target=True))
        else:
            losses.append(F.mse_loss(mine.float(), theirs.float()) / theirs.float().var().clamp_min(1e-12))
    return torch.stack(losses).mean()


def recover_module(
    student: Forwarding,
    teacher: Forwarding,
    weights: Weights,
    masks: Weights,
    matrices: Mapping[str, Matrix],
    forms: Mapping[str, Format],
    batches: Sequence[Batch],
    recipe: ModuleRecipe,
    machine: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Distil the student's `weights` (masked, unquantized); masked entries stay zero, matrices of `forms` train under rounding.

    Returns the new weights and {"tokens" (examples seen), "seconds", "loss", "qat"}; `stop()` ends early between two steps.
    """
    parameters = {name: torch.nn.Parameter(value.detach().clone()) for name, value in weights.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.lr, weight_decay=0.0)
    size, seconds, seen, loss_value = len(batches[0].inputs[0]), 0.0, 0, float("nan")
    steps = max(1, math.ceil(recipe.examples / size))
    kind = student.plugin.distillation
    for step in range(steps):
        if stop():
            break
        batch = batches[_order(step, len(batches), recipe.seed)]
        with machine():
            begun = time.monotonic()  # waiting for a measurement to end is no training
            with torch.no_grad():
                target = teacher(*batch.inputs)
            outputs = student.with_weights(effective_weights(_masked(parameters, masks), matrices, forms), batch.inputs)
            loss = distillation_loss(kind, outputs, target)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * decay(step, step / steps, max(1, min(10, steps // 6)))
            optimizer.step()
            seconds += time.monotonic() - begun
        seen, loss_value = seen + size, loss.item()
    found = _masked({name: value.detach() for name, value in parameters.items()}, masks)
    facts = {"tokens": float(seen), "seconds": seconds, "loss": loss_value, "qat": float(bool(forms))}
    return found, facts


def _masked(weights: Weights, masks: Weights) -> dict[str, torch.Tensor]:
    return {name: value * masks[name] if name in masks else value for name, value in weights.items()}


def _order(step: int, batches: int, seed: int) -> int:
    """Which batch a step takes: all of them in a new random order every epoch, a pure function of (seed, step)."""
    epoch, position = divmod(step, batches)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randperm(batches, generator=generator)[position])
