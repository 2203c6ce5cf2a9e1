"""What a student learns from: the teacher's soft labels and the text."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, ce_weight: float
) -> torch.Tensor:
    """(1 - w) KL(teacher || student) + w cross-entropy on the text, in nats per token (Hinton et al. 2015, temperature 1).

    Logits are [batch, length, vocab], `ids` [batch, length]; the KL covers every position, the cross-entropy all but the last.
    """
    log_student = F.log_softmax(student.float(), dim=-1)
    log_teacher = F.log_softmax(teacher.float(), dim=-1)
    loss = F.kl_div(log_student.flatten(0, 1), log_teacher.flatten(0, 1), reduction="batchmean", log_target=True)
    if ce_weight == 0.0:
        return loss
    ce = F.nll_loss(log_student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return (1 - ce_weight) * loss + ce_weight * ce
