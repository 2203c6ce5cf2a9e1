"""The optimizer of matrices that pretraining and distillation share."""

from __future__ import annotations

import math

import torch

from paretune.hardware_profiles.training_precision import training_dtype


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024) whose Newton-Schulz iteration runs in `training_dtype` and not always in bfloat16.

    Groups, state and results in bfloat16 are torch's own.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if training_dtype() is torch.bfloat16:
            super().step(closure)  # type: ignore[no-untyped-call]
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: torch.Tensor, group: dict[str, object]) -> None:
        lr, momentum = float(group["lr"]), float(group["momentum"])  # type: ignore[arg-type]
        assert p.grad is not None and group["adjust_lr_fn"] == "original"
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
        buffer.lerp_(p.grad, 1 - momentum)
        update = p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = _orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])  # type: ignore[arg-type]
        p.mul_(1 - lr * float(group["weight_decay"]))  # type: ignore[arg-type]
        p.add_(update, alpha=-lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])))


def _orthogonalized(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """The nearly orthogonal factor of `x` [M, N] by Newton-Schulz, in the precision of `x`."""
    a, b, c = coefficients
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if x.shape[0] <= x.shape[1] else wide.T
