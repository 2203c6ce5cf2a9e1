"""What a student learns from: the teacher's soft labels and the text."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class _SoftCrossEntropy(torch.autograd.Function):
    """Mean over rows of -sum(p log softmax(x)); the gradient softmax(x) - p needs no second pass over the vocabulary.

    torch's own soft-label cross-entropy keeps three float32 tables of [tokens, vocab]; this keeps one, in bf16.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        log_p = F.log_softmax(logits.float(), dim=-1)
        loss = -(probabilities * log_p).sum() / len(logits)
        ctx.save_for_backward((log_p.exp_() - probabilities).to(torch.bfloat16))
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (grads[0] / len(difference))).to(ctx.dtype), None


class SoftLabels:
    """The teacher's distribution for one batch, computed once for all students: logits [batch, length, vocab]."""

    def __init__(self, logits: torch.Tensor) -> None:
        log_p = F.log_softmax(logits.detach().float().flatten(0, -2), dim=-1)
        self.probabilities = log_p.exp()
        self.entropy = -(self.probabilities * log_p).sum() / len(log_p)


def distillation_loss(student: torch.Tensor, teacher: SoftLabels, ids: torch.Tensor, ce_weight: float) -> torch.Tensor:
    """(1 - w) KL(teacher || student) + w cross-entropy on the text, in nats per token (Hinton et al. 2015, temperature 1).

    Student logits are [batch, length, vocab], `ids` [batch, length]; the KL covers every position, the cross-entropy all but the last.
    """
    soft: torch.Tensor = _SoftCrossEntropy.apply(student.flatten(0, 1), teacher.probabilities)  # type: ignore[no-untyped-call]
    loss = soft - teacher.entropy
    if ce_weight == 0.0:
        return loss
    ce = F.cross_entropy(student[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    return (1 - ce_weight) * loss + ce_weight * ce
