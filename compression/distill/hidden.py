"""Hidden-state matching: the outputs of the student's layers against those of the teacher's layers that they stand for.

A student's layer stands for the kept teacher layer and the dropped ones behind it, so its output is compared with what the
next kept layer reads. Both are divided by their root mean square per token, because the residual stream grows with depth
and a few channels carry most of it (hints of Romero et al. 2014, arXiv 1412.6550; layer mapping of TinyBERT, Jiao et al.
2019, arXiv 1909.10351; normalised MSE as in Nemotron Elastic, arXiv 2511.16664).

Suggested weight: 0 to 1. It helps most in the first steps after a deep cut; for long recoveries the KL alone is as good.
It needs the teacher's layers, so cached labels save nothing, and the same hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from paretune.compression.network.student import Network


@contextlib.contextmanager
def layer_outputs(network: Network) -> Iterator[list[torch.Tensor]]:
    """A context in which every forward pass leaves the output of each layer, [batch, length, hidden], in the list."""
    found: list[torch.Tensor] = []

    def see(index: int) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            if index == 0:
                found.clear()
            found.append(output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [layer.register_forward_hook(see(i)) for i, layer in enumerate(network.layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def segments(kept: Sequence[int], layers: int) -> list[range]:
    """The teacher's layers that each kept one stands for: itself and the dropped ones up to the next kept one.

    Raises ValueError unless `kept` ascends from 0 within `layers`.
    """
    if not kept or kept[0] != 0 or list(kept) != sorted(set(kept)) or kept[-1] >= layers:
        raise ValueError(f"the kept layers must ascend from 0 to below {layers}, but got {list(kept)}")
    return [range(start, end) for start, end in zip(kept, [*kept[1:], layers], strict=True)]


def hidden_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean squared difference of normalised hidden states, averaged over layers; 0 (equal) to 4 (opposite).

    Both are one tensor [batch, length, hidden] per layer of the student. Raises ValueError where the shapes do not allow it.
    """
    check_hidden_widths(student[0].shape[-1], teacher[0].shape[-1])
    if len(student) != len(teacher):
        raise ValueError(f"there must be a teacher's layer for each of {len(student)}, but got {len(teacher)}")
    parts = [(_normalised(s) - _normalised(t.detach())).square().mean() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()


def check_hidden_widths(student: int, teacher: int) -> None:
    """Raises ValueError unless the widths are the same."""
    if student != teacher:
        raise ValueError(
            f"hidden states can be matched at the same hidden width only, but the student has {student} and the teacher "
            f"{teacher}; set recovery.hidden_weight to 0, or keep the hidden width"
        )


def _normalised(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * x.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
