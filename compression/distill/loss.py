"""What a student learns from: the teacher's soft labels and the text.

KL on logits softened by a temperature (Hinton, Vinyals & Dean 2015, arXiv 1503.02531), scaled by its square so that the
gradient keeps its size, and cross-entropy on the text. Suggested: temperature 1 for language models, where the tail is
noise; 2 to 4 where the teacher is very sure of itself. A cross-entropy weight above about 0.3 hurts: the teacher says more
per token than the text does. Soft labels may be cut to the likeliest tokens (`TopLabels`).
"""

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


class _TopCrossEntropy(torch.autograd.Function):
    """Mean over rows of -sum(p log q) over the k given tokens and one bucket for all others, q = softmax(x).

    The gradient is q - p on the given tokens and q (1 - p_rest / q_rest) on the others: within the bucket the student keeps
    its own proportions.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, tokens: torch.Tensor, top: torch.Tensor, rest: torch.Tensor
    ) -> torch.Tensor:
        log_q = F.log_softmax(logits.float(), dim=-1)
        log_q_top = log_q.gather(1, tokens)
        q = log_q.exp_()
        q_top = log_q_top.exp()
        q_rest = q.scatter_(1, tokens, 0.0).sum(1).clamp_(min=1e-30)
        loss = -((top * log_q_top).sum() + (rest * q_rest.log()).sum()) / len(logits)
        q.mul_((1 - rest / q_rest).unsqueeze(1)).scatter_(1, tokens, q_top - top)
        ctx.save_for_backward(q.to(torch.bfloat16))
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * (grads[0] / len(difference))).to(ctx.dtype), None, None, None


class SoftLabels:
    """The teacher's distribution for one batch, computed once for all students: logits [batch, length, vocab].

    `entropy` is its mean over the batch's tokens in nats, `temperature` (above 0) what the logits were divided by.
    """

    def __init__(self, logits: torch.Tensor, temperature: float = 1.0) -> None:
        log_p = F.log_softmax(logits.detach().float().flatten(0, -2).div(temperature), dim=-1)
        self.probabilities = log_p.exp()
        self.entropy = -(self.probabilities * log_p).sum() / len(log_p)
        self.temperature = temperature

    def kl(self, student: torch.Tensor) -> torch.Tensor:
        """Mean KL(teacher || student) in nats per token; student logits [batch, length, vocab], not yet divided."""
        x = student.flatten(0, -2)
        soft: torch.Tensor = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x if self.temperature == 1.0 else x / self.temperature, self.probabilities
        )
        return soft - self.entropy


class TopLabels:
    """The teacher's distribution cut to its k likeliest tokens: `tokens` [n, k], their log-probabilities [n, k] and the log of
    what all others have together [n], at `temperature`.

    Its KL never exceeds the full one; what is missing is p_rest KL(p given rest || q given rest) (chain rule).
    """

    def __init__(
        self, tokens: torch.Tensor, log_top: torch.Tensor, log_rest: torch.Tensor, temperature: float = 1.0
    ) -> None:
        whole = torch.cat([log_top.float(), log_rest.float().unsqueeze(1)], dim=1).log_softmax(-1)  # sums to 1 again
        p = whole.exp()
        self.tokens, self.top, self.rest = tokens.long(), p[:, :-1], p[:, -1]
        self.log_top, self.log_rest = whole[:, :-1], whole[:, -1]
        self.entropy = -(p * whole.clamp(min=-1e4)).sum() / len(p)
        self.temperature = temperature

    @classmethod
    def of(cls, logits: torch.Tensor, k: int, temperature: float = 1.0) -> TopLabels:
        """The cut of the teacher's logits [batch, length, vocab]."""
        log_p = F.log_softmax(logits.detach().float().flatten(0, -2).div(temperature), dim=-1)
        log_top, tokens = log_p.topk(min(k, log_p.shape[1]), dim=-1)
        rest = log_p.exp().scatter_(1, tokens, 0.0).sum(1)
        return cls(tokens, log_top, rest.clamp(min=1e-30).log(), temperature)

    def kl(self, student: torch.Tensor) -> torch.Tensor:
        """Mean KL over the k + 1 outcomes in nats per token; student logits [batch, length, vocab], not yet divided."""
        x = student.flatten(0, -2)
        soft: torch.Tensor = _TopCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x if self.temperature == 1.0 else x / self.temperature, self.tokens, self.top, self.rest
        )
        return soft - self.entropy


def distillation_loss(
    student: torch.Tensor,
    teacher: SoftLabels | TopLabels,
    ids: torch.Tensor,
    ce_weight: float,
    kl_weight: float | None = None,
) -> torch.Tensor:
    """kl_weight T² KL(teacher || student) + ce_weight cross-entropy on the text, in nats per token; T is the labels' temperature.

    Student logits are [batch, length, vocab], `ids` [batch, length]; the KL covers every position, the cross-entropy all but
    the last. `kl_weight` is 1 - ce_weight where it is left out.
    """
    if kl_weight is None:
        kl_weight = 1 - ce_weight
    loss = (kl_weight * teacher.temperature**2) * teacher.kl(student) if kl_weight else student.new_zeros(())
    if ce_weight == 0.0:
        return loss
    ce = F.cross_entropy(student[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    return loss + ce_weight * ce
