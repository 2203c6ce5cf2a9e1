"""Recovery: distil one candidate under its mask and, where quantization is what hurts, under its fake-quant (QAT).

QAT comes second: the first `ptq_share` of the tokens is trained without rounding, then `decide` says from what post-training
quantization makes of it whether the rest sees the rounding. Most of a budget in full precision and the end of it with
rounding is also what serves QAT best (ParetoQ, Liu et al. 2025, arXiv 2502.02631). Straight-through gradients: Bengio et al.
2013, arXiv 1308.3432.

Suggested: some hundred thousand tokens at 5M parameters; fewer than 10,000 do not pay for the noise they bring. It hurts
candidates that have next to nothing to recover, so the caller compares before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from paretune.compression.distill.hidden import check_hidden_widths, hidden_loss, layer_outputs, segments
from paretune.compression.distill.labels import LabelCache, soft_labels
from paretune.compression.distill.loss import SoftLabels, TopLabels, distillation_loss
from paretune.compression.distill.optimizer import Optimizers, decay
from paretune.compression.network.student import EMBEDDING, Network, quantized_weights
from paretune.compression.prune import warn_if_idle
from paretune.hardware_profiles.training_precision import autocast
from paretune.spaces.candidate import Candidate
from paretune.teachers.text.batches import Batches

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class RecoveryRecipe:
    """`tokens` of distillation for every finalist alike. `qat` is "auto" (4-bit layers only), "always" or "never".

    `kl_weight`, `ce_weight` and `hidden_weight` are at least 0, `temperature` above 0 (1: the teacher as it is), `ptq_share`
    in [0, 1] is what is trained before anybody decides about QAT.

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
    kl_weight: float = 0.9
    hidden_weight: float = 0.0
    temperature: float = 1.0
    ptq_share: float = 0.5

    @property
    def steps(self) -> int:
        """Number of training steps that `tokens` allow, at least 1."""
        return max(1, self.tokens // (self.batch * self.context))

    def uses_qat(self, candidate: Candidate) -> bool:
        """Whether training may see the rounding.

        "auto" allows it with layers of fewer than 8 bits, whose error a few steps can move; "always" with any quantized
        matrix. A candidate with codes from calibration text never is.
        """
        if candidate.needs_calibration:
            return False
        if self.qat == "auto":
            return any(f.bits < 8 for layer in candidate.layers for f in (layer.attention_format, layer.ffn_format))
        return self.qat == "always" and candidate.is_quantized


def recover(
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
    cache: LabelCache | None = None,
    decide: Callable[[dict[str, torch.Tensor]], bool] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Distil the candidate's `weights` (masked, unquantized) from the teacher of `depth` layers; masked entries stay zero.

    `kept` are the teacher's layers of the student (for hidden-state matching; all if left out), `cache` keeps the teacher's
    labels. `decide(weights)` is asked once, after `ptq_share` of the steps, whether the rest sees the rounding; without
    it all steps do, if the candidate may be trained so. Returns the new weights and {"tokens", "seconds", "loss",
    "qat"}; `stop()` ends early between two steps. Warns (NothingChanged) if there are masks and none drops a weight;
    raises ValueError if one names no weight, or where hidden states cannot be matched.
    """
    if unknown := sorted(masks.keys() - weights.keys()):
        raise ValueError(f"every mask must belong to a weight of the student, but it has no {', '.join(unknown)}")
    if masks:
        warn_if_idle(masks, "recovery under masks that drop no weight is recovery of the dense student")
    run = _Recovery(teacher_weights, weights, masks, candidate, networks, depth, recipe, kept, cache)
    batches = Batches(tokens, recipe.context, recipe.batch, recipe.seed)
    may = recipe.uses_qat(candidate)
    rounding, asked = may and decide is None, round(recipe.steps * recipe.ptq_share)
    start, done, loss = time.monotonic(), 0, float("nan")
    for step in range(recipe.steps):
        if stop():
            break
        if may and decide is not None and step == min(asked, recipe.steps - 1):
            rounding = decide(run.result())
        with machine(), autocast():
            loss = run.step(batches.at(step), step, rounding)
        done += 1
    facts = {
        "tokens": float(done * recipe.batch * recipe.context),
        "seconds": time.monotonic() - start,
        "loss": loss,
        "qat": float(rounding),
    }
    return run.result(), facts


class _Recovery:
    """The state of one recovery: parameters, optimizers, and where the labels come from."""

    def __init__(
        self,
        teacher_weights: Weights,
        weights: Weights,
        masks: Weights,
        candidate: Candidate,
        networks: Callable[[int], Network],
        depth: int,
        recipe: RecoveryRecipe,
        kept: Sequence[int],
        cache: LabelCache | None,
    ) -> None:
        self.teacher_weights, self.masks, self.candidate, self.recipe = teacher_weights, masks, candidate, recipe
        self.teacher, self.network, self.cache = networks(depth), networks(len(candidate.layers)), cache
        self.parameters = {name: torch.nn.Parameter(value.detach().clone().float()) for name, value in weights.items()}
        self.optimizers = Optimizers(self.parameters, recipe.muon_lr, recipe.adamw_lr)
        self.stands_for: list[int] = []
        if recipe.hidden_weight:
            check_hidden_widths(weights[EMBEDDING].shape[1], teacher_weights[EMBEDDING].shape[1])
            self.stands_for = [part[-1] for part in segments(kept or range(len(candidate.layers)), depth)]

    def step(self, ids: torch.Tensor, step: int, rounding: bool) -> float:
        """One batch; returns its loss."""
        recipe = self.recipe
        labels, targets = self._from_teacher(ids)
        masked = {n: v * self.masks[n] if n in self.masks else v for n, v in self.parameters.items()}
        watching: AbstractContextManager[list[torch.Tensor]] = nullcontext([])
        if recipe.hidden_weight:
            watching = layer_outputs(self.network)
        with watching as outputs:
            if rounding:
                with self.network.activations(self.candidate):
                    logits = self.network(quantized_weights(masked, self.candidate), ids)
            else:
                logits = self.network(masked, ids)
        loss = distillation_loss(logits, labels, ids, recipe.ce_weight, recipe.kl_weight)
        if recipe.hidden_weight:
            loss = loss + recipe.hidden_weight * hidden_loss(outputs, targets)
        torch.autograd.backward(loss)
        self.optimizers.step(decay(step, step / recipe.steps, max(1, min(10, recipe.steps // 6))))
        return loss.item()

    @torch.no_grad()
    def _from_teacher(self, ids: torch.Tensor) -> tuple[SoftLabels | TopLabels, list[torch.Tensor]]:
        """Soft labels and, where they are matched, the hidden states that the student's layers stand for."""

        def logits() -> torch.Tensor:
            return self.teacher(self.teacher_weights, ids)

        recipe = self.recipe
        if not recipe.hidden_weight:
            return soft_labels(logits, ids, recipe.temperature, self.cache), []
        with layer_outputs(self.teacher) as outputs:
            labels = SoftLabels(logits(), recipe.temperature)
        return labels, [outputs[i] for i in self.stands_for]

    def result(self) -> dict[str, torch.Tensor]:
        """The weights as they are now, masked."""
        return {
            name: (value.detach() * self.masks[name] if name in self.masks else value.detach())
            for name, value in self.parameters.items()
        }
