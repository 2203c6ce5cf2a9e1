"""Sparsity: what to cut (scores), which cut (patterns), and the structural cuts that shrink the model."""

from paretune.compression.prune.given import NothingChanged, masks_of_student, put_masks, take_masks, warn_if_idle
from paretune.compression.prune.masks import mask_for
from paretune.compression.prune.sparsegpt import sparsegpt
from paretune.compression.prune.statistics import LayerStatistics, layer_statistics
from paretune.compression.prune.structure import Importance, importance, slice_weights, sort_by_importance

__all__ = [
    "Importance",
    "LayerStatistics",
    "NothingChanged",
    "importance",
    "layer_statistics",
    "mask_for",
    "masks_of_student",
    "put_masks",
    "slice_weights",
    "sort_by_importance",
    "sparsegpt",
    "take_masks",
    "warn_if_idle",
]
