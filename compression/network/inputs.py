"""What the inputs of a student's matrices look like on calibration text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from paretune.compression.network.student import HEAD, Network

# Which matrices read the input of the first of them; the same inputs need one Gram matrix. Not every family has a gate.
READERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}

Inputs = Callable[[int, tuple[str, ...], torch.Tensor], None]


@contextlib.contextmanager
def watching_inputs(network: Network, see: Inputs) -> Iterator[None]:
    """A context in which `see(layer, names, x)` is called with the inputs [..., K] that the matrices `names` of a layer share."""
    handles = []
    for i, layer in enumerate(network.layers):
        for readers in READERS.values():
            names = network.present(readers)

            def hook(
                _module: torch.nn.Module, inputs: tuple[Any, ...], i: int = i, names: tuple[str, ...] = names
            ) -> None:
                see(i, names, inputs[0])

            handles.append(network.part(layer, names[0]).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def each_input(
    network: Network,
    weights: Mapping[str, torch.Tensor],
    ids: torch.Tensor,
    use: Callable[[tuple[str, ...], torch.Tensor], None],
) -> None:
    """Run `ids` [batch, length] through the student once; `use(names, x)` gets the inputs that the weights `names` share.

    The Gram matrix of a wide FFN is larger than its weights, so use one before the next comes. The head comes last.
    """

    def see(i: int, names: tuple[str, ...], x: torch.Tensor) -> None:
        use(tuple(f"model.layers.{i}.{name}.weight" for name in names), x)

    with watching_inputs(network, see):
        hidden = network.hidden(weights, ids)
    use((HEAD,), hidden)
