"""One rank's part of a teacher's tensors, read from memory-mapped safetensors without the parts of the others.

The split is Megatron-LM's (Shoeybi et al. 2019, arXiv 1909.08053, section 3). What makes queries, keys, values or FFN neurons is cut by
rows, what reads them by columns: each rank computes whole heads and whole neurons, and its output product is one term of a
sum over the ranks. Embedding and head are cut by rows of the vocabulary. Norms and positions are on every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from paretune.common.errors import UsageError
from paretune.spaces.candidate import Shape
from paretune.teachers.checkpoint.families import HEAD, Axis, family_of
from paretune.teachers.checkpoint.layout import from_stored, stored_as
from paretune.teachers.checkpoint.pruned import MASK, ORIGINAL, masked_names

if TYPE_CHECKING:
    import torch

    from paretune.teachers.checkpoint.teacher import Teacher

SPLIT_AXES: tuple[Axis, ...] = ("query", "kv", "ffn", "vocab")
"""The axes that are divided among ranks; no tensor has two of them."""
# Biases that follow a sum over the ranks: the first rank has them, the others zeros, so that they are added once.
SUMMED_BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")


def check_degree(shape: Shape, degree: int) -> None:
    """Raises UsageError unless `degree` ranks can each have whole KV heads and FFN neurons, the same number of them."""
    possible = degrees_of(shape)
    if degree not in possible:
        raise UsageError(
            f"the number of ranks must divide the {shape.kv_heads} KV heads and the {shape.ffn} FFN neurons, but got {degree}",
            f"choose one of {', '.join(map(str, possible))}",
        )


def degrees_of(shape: Shape) -> list[int]:
    """Every possible number of ranks, ascending, beginning with 1. KV heads are never repeated on several ranks."""
    return [n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0 and shape.ffn % n == 0]


def part_of(length: int, rank: int, degree: int) -> tuple[int, int]:
    """(start, stop) of a rank's part of an axis. A vocabulary need not be a multiple of `degree`: parts differ by at most one row."""
    return length * rank // degree, length * (rank + 1) // degree


def axes_of(name: str, shape: Shape) -> tuple[Axis, ...]:
    """The axes of a tensor by this project's name."""
    family = family_of(shape)
    if name.startswith("model.layers."):
        return family.layer_tensors[name.split(".", 3)[3]]
    return HEAD[name] if name in HEAD else family.root_tensors[name]


def read_shard(teacher: Teacher, rank: int, degree: int) -> dict[str, torch.Tensor]:
    """The tensors of one of `degree` ranks as float32 under this project's names; masks of torch.nn.utils.prune are applied.

    Of a float32 file, rows stay memory-mapped and only columns are copied; other types are converted, a rank's own part only.
    Do not write into them. Raises UsageError where the shape cannot be divided so.
    """
    import torch

    shape = teacher.shape
    check_degree(shape, degree)
    weights, masks = _mapped(teacher)
    found = {}
    for name, value in weights.items():
        part = _cut(value, name, shape, rank, degree).to(torch.float32)
        if name in masks:
            part = part * (_cut(masks[name], name, shape, rank, degree) != 0)
        if rank and name.endswith(SUMMED_BIASES):
            part = torch.zeros_like(part)
        found[name] = part.contiguous()
    return found


def _cut(value: torch.Tensor, name: str, shape: Shape, rank: int, degree: int) -> torch.Tensor:
    """A view of the rank's part of a tensor [out, in]."""
    for dimension, axis in enumerate(axes_of(name, shape)):
        if axis in SPLIT_AXES:
            start, stop = part_of(value.shape[dimension], rank, degree)
            return value.narrow(dimension, start, stop - start)
    return value


def _mapped(teacher: Teacher) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(tensors, masks of those that have one), whole ones as views on the mapped files: nothing is read yet."""
    import torch
    from safetensors import safe_open

    stored: dict[str, torch.Tensor] = {}
    for file in teacher.weight_files:
        with safe_open(file, "pt") as tensors:
            stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    masked = masked_names(stored)
    masks = {name: stored.pop(name + MASK) for name in masked}
    stored |= {name: stored.pop(name + ORIGINAL) for name in masked}
    weights = from_stored(stored, teacher.shape)
    if not masks:
        return weights, {}
    one = torch.ones(())
    everywhere = {name: masks.get(name, one.expand(value.shape)) for name, value in stored.items()}
    kept = from_stored(everywhere, teacher.shape)
    return weights, {name: mask for name, mask in kept.items() if stored_as(name, teacher.shape, masks)}
