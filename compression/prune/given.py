"""Masks that somebody else made: from and to torch.nn.utils.prune, and sliced with the student they belong to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch.nn.utils import prune

from paretune.compression.prune.structure import LAYERS, Importance, slice_weights, sort_by_importance
from paretune.spaces.candidate import Candidate, Shape
from paretune.teachers.checkpoint.pruned import fold_masks


class NothingChanged(UserWarning):
    """An operation ran and left everything as it was."""


def take_masks(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(parameters and buffers with their zeros, masks) of a module pruned with torch.nn.utils.prune, by the unpruned names.

    The masks are boolean, True where a weight stays; the module is left as it is. Warns (NothingChanged) if it is not pruned.
    """
    weights, masks = fold_masks({name: value.detach() for name, value in module.state_dict().items()})
    warn_if_idle(masks, "torch.nn.utils.prune has masked nothing in this module")
    return weights, masks


def put_masks(module: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Put masks on a module as torch.nn.utils.prune does, so that `weight` becomes `weight_orig` times `weight_mask`.

    A parameter that has a mask already keeps the zeros of both. Raises ValueError if a name is no parameter of the module or a
    shape differs, before anything is changed; warns (NothingChanged) if no mask drops a weight.
    """
    owners = {name: _owner(module, name) for name in masks}
    for name, mask in masks.items():
        value = getattr(*owners[name])
        if value.shape != mask.shape:
            raise ValueError(f"the mask of {name} must have shape {tuple(value.shape)}, but has {tuple(mask.shape)}")
    warn_if_idle(masks, "the masks drop no weight of this module")
    for name, mask in masks.items():
        owner, own = owners[name]
        prune.custom_from_mask(owner, own, mask.to(getattr(owner, own).dtype))  # type: ignore[no-untyped-call]


def _owner(module: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    path, _, own = name.rpartition(".")
    owner: torch.nn.Module | None
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is None or not ({own, f"{own}_orig"} & set(owner._parameters)):
        raise ValueError(f"a mask must name a parameter of the module, but it has no {name}")
    return owner, own


def masks_of_student(
    masks: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    candidate: Candidate,
    order: Importance,
    shape: Shape,
) -> dict[str, torch.Tensor]:
    """The teacher's `masks` as far as they reach into a student: sorted and sliced like the teacher's `weights`.

    Layers without the pattern "given" get none; the embedding, head and norms get theirs if any layer has it.
    """
    full = {
        name: masks.get(name, torch.ones((), dtype=torch.bool).expand(value.shape)) for name, value in weights.items()
    }
    if not candidate.is_full_size(shape):
        full = slice_weights(sort_by_importance(full, order, shape), candidate, order, shape)
    given = {f"{LAYERS}{i}." for i, layer in enumerate(candidate.layers) if layer.pattern.kind == "given"}

    def wanted(name: str) -> bool:
        return bool(given) and (not name.startswith(LAYERS) or any(name.startswith(prefix) for prefix in given))

    return {name: mask for name, mask in full.items() if wanted(name) and not bool(mask.all())}


def warn_if_idle(masks: Mapping[str, torch.Tensor], said: str) -> None:
    """Warn (NothingChanged) if `masks` (boolean, or zeros and ones) are none, or drop no weight at all."""
    if all(bool(mask.all()) for mask in masks.values()):
        warnings.warn(said, NothingChanged, stacklevel=3)
