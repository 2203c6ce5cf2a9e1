"""Structural pruning as prefixes: sort every width once by activation importance, then a student is a slice.

FFN neurons are ranked by the L2 norm of their activations at the input of down_proj, KV groups by that at o_proj, residual
channels by the sum over all layers of their norms behind the two layer norms (as in Minitron, arXiv 2407.14679), layers by
block influence (ShortGPT, arXiv 2403.03853), the first and the last layer always kept. Sorting permutes rows and columns
together, so the sorted model computes what the model computed. A slice of the residual stream does not compute a part of it:
RMS norm over fewer channels divides by another mean square, and only training repairs that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from paretune.compression.prune.statistics import LayerStatistics
from paretune.spaces.candidate import Candidate, Shape
from paretune.teachers.checkpoint.families import CUT_AXES, Axis, axis_sizes, family_of

# Tensors under another name are the model's own: embedding, last norm and head, all of whose last axis is the residual stream.
LAYERS = "model.layers."


@dataclass(frozen=True)
class Importance:
    """Orders, most important first: `ffn` and `groups` per layer, `layers` and `hidden` of the whole model.

    An empty `hidden` leaves the residual channels as they are, for students that keep them all.
    """

    ffn: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    hidden: tuple[int, ...] = ()

    def kept_layers(self, depth: int) -> list[int]:
        """The `depth` most important layers in their original order; keep-sets of growing depth are nested."""
        return sorted(self.layers[:depth])


def importance(statistics: list[LayerStatistics], shape: Shape, hidden: bool = False) -> Importance:
    """Orders from the statistics of a calibration run; of the residual channels only if `hidden`."""
    ffn, groups = [], []
    per_group = shape.heads_per_group * shape.head_dim
    for found in statistics:
        neurons = found.input_norms["mlp.down_proj"]
        ffn.append(tuple(neurons.argsort(descending=True, stable=True).tolist()))
        heads = found.input_norms["self_attn.o_proj"].view(shape.kv_heads, per_group).norm(dim=1)
        groups.append(tuple(heads.argsort(descending=True, stable=True).tolist()))
    ends = [0] if shape.layers == 1 else [0, shape.layers - 1]
    inner = sorted((i for i in range(shape.layers) if i not in ends), key=lambda i: -statistics[i].influence)
    return Importance(tuple(ffn), tuple(groups), tuple(ends + inner), _residual(statistics) if hidden else ())


def _residual(statistics: list[LayerStatistics]) -> tuple[int, ...]:
    """Residual channels by the norms of what the attention and the FFN of every layer read from them."""
    norms = [found.input_norms[name] for found in statistics for name in ("self_attn.q_proj", "mlp.gate_proj")]
    return tuple(torch.stack(norms).sum(0).argsort(descending=True, stable=True).tolist())


def sort_by_importance(weights: Mapping[str, torch.Tensor], order: Importance, shape: Shape) -> dict[str, torch.Tensor]:
    """The same model with FFN neurons, KV groups and residual channels in the order of importance."""
    found = dict(weights)
    residual = torch.tensor(order.hidden or range(shape.hidden))
    for name, value in weights.items():
        if order.hidden and not name.startswith(LAYERS):
            found[name] = value.index_select(value.ndim - 1, residual)
    for i in range(shape.layers):
        rows: dict[Axis, torch.Tensor] = {
            "ffn": torch.tensor(order.ffn[i]),
            "query": _rows(order.groups[i], shape.heads_per_group * shape.head_dim),
            "kv": _rows(order.groups[i], shape.head_dim),
            **({"hidden": residual} if order.hidden else {}),
        }
        for name, axes in family_of(shape).layer_tensors.items():
            full = f"model.layers.{i}.{name}"
            for dimension, axis in enumerate(axes):
                if axis in rows:
                    found[full] = found[full].index_select(dimension, rows[axis])
    return found


def slice_weights(
    weights: Mapping[str, torch.Tensor], candidate: Candidate, order: Importance, shape: Shape
) -> dict[str, torch.Tensor]:
    """Views of the sorted weights that make up the candidate's student; layers are numbered anew from 0."""
    hidden = candidate.width(shape)
    found = {n: value.narrow(-1, 0, hidden) for n, value in weights.items() if not n.startswith(LAYERS)}
    tensors = family_of(shape).layer_tensors
    for new, old in enumerate(order.kept_layers(len(candidate.layers))):
        widths = candidate.layers[new]
        sizes = axis_sizes(shape, widths.ffn, widths.kv_groups, hidden)
        for name, axes in tensors.items():
            value = weights[f"model.layers.{old}.{name}"]
            for dimension, axis in enumerate(axes):
                if axis in CUT_AXES:
                    value = value.narrow(dimension, 0, sizes[axis])
            found[f"model.layers.{new}.{name}"] = value
    return found


def _rows(groups: tuple[int, ...], size: int) -> torch.Tensor:
    return torch.cat([torch.arange(g * size, (g + 1) * size) for g in groups])
