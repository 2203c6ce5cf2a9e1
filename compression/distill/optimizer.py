"""Muon on the matrices of the layers, AdamW on tables and norms, with a linear decay."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from paretune.teachers.muon import Muon


class Optimizers:
    """The pair of optimizers over named parameters; `step(scale)` applies the gradients with the learning rates scaled."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], muon_lr: float, adamw_lr: float) -> None:
        matrices = [p for name, p in parameters.items() if p.ndim == 2 and ".layers." in name]
        tables = [p for name, p in parameters.items() if p.ndim == 2 and ".layers." not in name]
        norms = [p for p in parameters.values() if p.ndim < 2]
        self.pair: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"),
            torch.optim.AdamW(
                [{"params": tables}, {"params": norms}], lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
            ),
        ]
        self.peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.pair]
        self.parameters = list(parameters.values())

    def step(self, scale: float) -> None:
        """Clip the gradients to a total norm of 1, step at `scale` times the peak rates, and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rates in zip(self.pair, self.peak, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def decay(step: int, progress: float, warmup: int = 10) -> float:
    """Linear warm-up over `warmup` steps, then linear decay to 2 % as `progress` goes from 0 to 1."""
    return min(1.0, (step + 1) / warmup) * max(0.02, 1.0 - progress)
