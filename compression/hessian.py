"""What the inputs of a student's matrices look like on calibration text: the Gram matrices of second-order methods.

For the squared error of a matrix's output, sum over samples of |(W - Q) x|², the Hessian of every row of W is X^T X. GPTQ and
SparseGPT need its inverse in order of the columns: what is lost in one column is made up for in the later ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from paretune.compression.student import HEAD, Network

# Which matrices read the input of the first of them; the same inputs need one Gram matrix. Not every family has a gate.
READERS = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
DAMPING = 0.01
MOST_DAMPING = 1.0

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


def grams(network: Network, weights: Mapping[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Gram matrix of every matrix's input by the weight's name; matrices with the same input share one."""
    found: dict[str, torch.Tensor] = {}
    each_input(network, weights, ids, lambda names, x: found.update(dict.fromkeys(names, gram_of(x))))
    return found


def gram_of(x: torch.Tensor) -> torch.Tensor:
    """X^T X / n [K, K] (float32) of inputs [..., K] with n rows."""
    rows = x.detach().float().flatten(0, -2)
    return rows.T @ rows / len(rows)


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper triangular U [K, K] (float64) with U^T U the inverse of the damped Gram matrix.

    Row j of U says what to do when column j is settled and only later ones may still move: an error e in it is best made up
    for by -e / U[j, j] * U[j, j+1:]. The damping, 1 % of the mean diagonal as in the papers, grows tenfold until the
    factorization succeeds. Raises ValueError if the matrix has entries that are not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix of the calibration inputs must be finite, but it is not")
    h = gram.double()
    scale, damping = float(h.diagonal().mean()) or 1.0, DAMPING
    while True:
        factor, failed = torch.linalg.cholesky_ex(h + damping * scale * torch.eye(len(h), dtype=h.dtype))
        if not failed or damping >= MOST_DAMPING:
            break
        damping *= 10
    upper: torch.Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper
