"""Checkpoints that were pruned before: the `*_orig` and `*_mask` tensors of torch.nn.utils.prune, or plain zeros.

`torch.nn.utils.prune` keeps the parameter `weight` of a module as a parameter `weight_orig` and a buffer `weight_mask`, whose
product the module computes with; a checkpoint saved without `prune.remove` holds these two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

ORIGINAL, MASK = "_orig", "_mask"
PARAMETERS = ("weight", "bias")  # other buffers may well be called causal_mask
# A matrix with a smaller share of zeros was not pruned: rounding to bf16 or fp16 leaves some too.
LEAST_ZEROS = 0.05

T = TypeVar("T")


def masked_names(names: Mapping[str, object]) -> list[str]:
    """Names of the parameters that are stored as `*_orig` and `*_mask`. Raises ValueError where half of a pair is missing."""
    found = []
    for name in names:
        for own, other in ((ORIGINAL, MASK), (MASK, ORIGINAL)):
            base = name.removesuffix(own)
            if base != name and base.endswith(PARAMETERS) and base + other not in names:
                raise ValueError(f"{base}{ORIGINAL} and {base}{MASK} come in pairs, but there is no {base}{other}")
        if name.endswith(tuple(own + ORIGINAL for own in PARAMETERS)):
            found.append(name.removesuffix(ORIGINAL))
    return found


def without_masks(shapes: Mapping[str, T]) -> dict[str, T]:
    """The shapes of a checkpoint's tensors under the names of the parameters they make up. Raises ValueError on bad pairs."""
    found = dict(shapes)
    for name in masked_names(shapes):
        size, mask = found.pop(name + ORIGINAL), found.pop(name + MASK)
        if size != mask:
            raise ValueError(f"{name}{ORIGINAL} and {name}{MASK} must have one shape, but have {size} and {mask}")
        found[name] = size
    return found


def fold_masks(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(parameters with their zeros, boolean masks of those that had one), both by the names of the parameters.

    Raises ValueError if half of a pair is missing, the shapes differ or a mask holds anything but zeros and ones.
    """
    without_masks({name: tuple(value.shape) for name, value in tensors.items()})
    found, masks = dict(tensors), dict[str, "torch.Tensor"]()
    for name in masked_names(tensors):
        original, mask = found.pop(name + ORIGINAL), found.pop(name + MASK)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{name}{MASK} must hold zeros and ones, but holds other values")
        masks[name] = mask != 0
        found[name] = original * masks[name]
    return found, masks


def zero_masks(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Masks (True where not zero) of the matrices of which at least 5 % are zeros."""
    masks = {name: value != 0 for name, value in weights.items() if value.ndim == 2}
    return {name: mask for name, mask in masks.items() if 1 - float(mask.float().mean()) >= LEAST_ZEROS}
