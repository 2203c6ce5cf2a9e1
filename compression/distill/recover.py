"""Recovery: distil one candidate under its mask and, where quantization is what hurts, under its fake-quant (QAT)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from paretune.compression.distill.loss import SoftLabels, distillation_loss
from paretune.compression.distill.optimizer import Optimizers, decay
from paretune.compression.student import Network, quantized_weights
from paretune.spaces.candidate import Candidate
from paretune.teachers.batches import Batches


@dataclass(frozen=True)
class RecoveryRecipe:
    """`tokens` of distillation for every finalist alike. `qat` is "auto" (4-bit layers only), "always" or "never".

    Codes from calibration text (GPTQ, clipping, static activations) and QAT exclude each other: such a candidate is trained
    without rounding, and calibrated on what comes out. So the candidate's `algorithm` is how its shipped codes were found, always.
    """

    tokens: int
    context: int = 256
    batch: int = 4
    muon_lr: float = 0.007
    adamw_lr: float = 7e-4
    ce_weight: float = 0.1
    qat: str = "auto"
    seed: int = 1

    def uses_qat(self, candidate: Candidate) -> bool:
        """Whether training sees the rounding: with 4-bit layers, whose error a few steps can move, unless they are calibrated."""
        if candidate.needs_calibration:
            return False
        if self.qat == "auto":
            return any(f.bits < 8 for layer in candidate.layers for f in (layer.attention_format, layer.ffn_format))
        return self.qat == "always" and candidate.is_quantized


def recover(
    teacher_weights: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    candidate: Candidate,
    networks: Callable[[int], Network],
    depth: int,
    tokens: Any,
    recipe: RecoveryRecipe,
    machine: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Distil the candidate's `weights` (masked, unquantized) from the teacher of `depth` layers; masked entries stay zero.

    Returns the new weights and {"tokens", "seconds", "loss"}; `stop()` ends early between two steps.
    """
    parameters = {name: torch.nn.Parameter(value.detach().clone().float()) for name, value in weights.items()}
    optimizers = Optimizers(parameters, recipe.muon_lr, recipe.adamw_lr)
    batches = Batches(tokens, recipe.context, recipe.batch, recipe.seed)
    network, qat = networks(len(candidate.layers)), recipe.uses_qat(candidate)
    steps, done, loss_value = max(1, recipe.tokens // (recipe.batch * recipe.context)), 0, float("nan")
    start = time.monotonic()
    for step in range(steps):
        if stop():
            break
        with machine(), torch.autocast("cpu", torch.bfloat16):
            ids = batches.at(step)
            with torch.no_grad():
                target = SoftLabels(networks(depth)(teacher_weights, ids))
            masked = {name: value * masks[name] if name in masks else value for name, value in parameters.items()}
            if qat:
                with network.activations(candidate):
                    logits = network(quantized_weights(masked, candidate), ids)
            else:
                logits = network(masked, ids)
            loss = distillation_loss(logits, target, ids, recipe.ce_weight)
            torch.autograd.backward(loss)
            optimizers.step(decay(step, step / steps, max(1, min(10, steps // 6))))
        done, loss_value = done + 1, loss.item()
    found = {
        name: (value.detach() * masks[name] if name in masks else value.detach()) for name, value in parameters.items()
    }
    facts = {
        "tokens": float(done * recipe.batch * recipe.context),
        "seconds": time.monotonic() - start,
        "loss": loss_value,
        "qat": float(qat),
    }
    return found, facts
