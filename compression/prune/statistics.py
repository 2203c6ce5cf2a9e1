"""Activation statistics of a model on the calibration text: input norms per matrix, and how much a layer changes its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from paretune.compression.network.inputs import watching_inputs
from paretune.compression.network.student import Network


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer: L2 norm of every input feature per linear (name to [K]), and 1 - mean cosine between input and output."""

    input_norms: dict[str, torch.Tensor]
    influence: float


@torch.no_grad()
def layer_statistics(network: Network, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> list[LayerStatistics]:
    """Run `ids` [batch, length] through the network once and collect the statistics of every layer."""
    squares: list[dict[str, torch.Tensor]] = [{} for _ in network.layers]
    influences = [0.0] * len(network.layers)
    handles = []

    def collect(i: int, names: tuple[str, ...], x: torch.Tensor) -> None:
        squares[i].update(dict.fromkeys(names, x.float().flatten(0, -2).square().sum(0)))

    for i, layer in enumerate(network.layers):

        def compare(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: Any, i: int = i) -> None:
            out = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(inputs[0].float(), out.float(), dim=-1)
            influences[i] = 1.0 - float(cosine.mean())

        handles.append(layer.register_forward_hook(compare))
    try:
        with watching_inputs(network, collect):
            network.hidden(weights, ids)  # no logits: those of a large vocabulary are the largest tensor of all
    finally:
        for handle in handles:
            handle.remove()
    return [
        LayerStatistics({name: value.sqrt() for name, value in found.items()}, influence)
        for found, influence in zip(squares, influences, strict=True)
    ]
