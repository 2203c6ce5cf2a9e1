"""What every matrix group loses in every format: one pass of the calibration text, the KL divergence to the teacher.

Each group (a layer's attention or FFN, the head, the embedding) is rounded alone, activations included, and the loss is the
mean KL(teacher || rounded) of the predictions, the measure of ZeroQ (Cai et al. 2020, arXiv 2001.00281). To second order it is
what HAWQ's Hessian (arXiv 1905.03696) and the Fisher information estimate, half dW^T F dW, but it holds for coarse formats too and needs no
gradients. Layers before the rounded one are not run again. No format is known here: whatever `quantized_weights` can
fake, can be in the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from paretune.compression.network.student import EMBEDDING, HEAD, Network, plain_candidate, quantized_weights
from paretune.hardware_profiles.detect import package_version
from paretune.spaces.candidate import FP32, Candidate, Format, Shape
from paretune.spaces.mixed import Sensitivity
from paretune.teachers.checkpoint.teacher import Teacher

REENTRY_ERROR = 1e-4
CODE = (
    "network/student.py",
    "network/gpt2.py",
    "quantize/grid.py",
    "quantize/half.py",
    "quantize/per_tensor.py",
    "calibration/sensitivity.py",
    "../spaces/candidate.py",
    "../teachers/checkpoint/families.py",
)

Weights = Mapping[str, torch.Tensor]


def sensitivity_key(teacher: Teacher, corpus: str, formats: tuple[Format, ...], tokens: int, window: int) -> str:
    """Content key: teacher, text, formats, the code that computes the table, library versions."""
    root = Path(__file__).resolve().parent.parent
    parts = [
        teacher.digest,
        corpus,
        json.dumps([[asdict(f) for f in formats], tokens, window], sort_keys=True),
        package_version("torch"),
        package_version("transformers"),
        *(hashlib.sha256((root / name).read_bytes()).hexdigest() for name in CODE),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@torch.no_grad()
def measure_sensitivity(
    networks: Callable[[int], Network],
    weights: Weights,
    shape: Shape,
    formats: tuple[Format, ...],
    ids: torch.Tensor,
    targets: torch.Tensor,
    batch: int = 8,
    machine: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Sensitivity:
    """The table of a teacher with `weights` on windows `ids` [n, length], of which row r has `targets[r]` targets.

    `networks(depth)` gives forward passes. Raises ValueError if a loss is not finite.
    """
    plain = plain_candidate(shape, shape.layers)
    rows = list(_rows(plain))
    totals = torch.zeros(len(rows), len(formats), dtype=torch.float64)
    for start in range(0, len(ids), batch):
        with machine():
            probe = _Probe(networks, weights, plain, ids[start : start + batch], targets[start : start + batch])
        for r, row in enumerate(rows):
            for j, form in enumerate(formats):
                if form.bits != FP32.bits:
                    with machine():
                        totals[r, j] += probe.divergence(row.rounded(plain, form), row.first)
    losses = (totals / max(1, int(targets.sum()))).clamp(min=0).tolist()
    if not bool(torch.isfinite(totals).all()):
        raise ValueError("the losses of the sensitivity table must be finite, but some are not")
    *layers, head, embedding = [tuple(row) for row in losses]
    return Sensitivity(formats, tuple(layers[0::2]), tuple(layers[1::2]), head, embedding)


@dataclass(frozen=True)
class _Row:
    """A matrix group and the layer from which the network must be run again."""

    name: str
    first: int

    def rounded(self, plain: Candidate, form: Format) -> Candidate:
        """`plain` with this group alone in `form`."""
        changed: dict[str, Any] = {self.name: form}
        if self.name in ("head_format", "embedding_format"):
            return replace(plain, **changed)
        layers = list(plain.layers)
        layers[self.first] = replace(layers[self.first], **changed)
        return replace(plain, layers=tuple(layers))


def _rows(plain: Candidate) -> Iterator[_Row]:
    for i in range(len(plain.layers)):
        yield _Row("attention_format", i)
        yield _Row("ffn_format", i)
    yield _Row("head_format", len(plain.layers) - 1)
    yield _Row("embedding_format", -1)


class _Probe:
    """The teacher's predictions on one batch, and what entered each of its layers, to go on from there."""

    def __init__(
        self,
        networks: Callable[[int], Network],
        weights: Weights,
        plain: Candidate,
        ids: torch.Tensor,
        targets: torch.Tensor,
    ) -> None:
        self.networks, self.weights, self.ids = networks, weights, ids
        self.valid = torch.arange(ids.shape[1] - 1)[None] < targets[:, None]
        self.entered: list[torch.Tensor] = []
        network = networks(len(plain.layers))
        with _watching(network, self.entered):
            hidden = network.hidden(weights, ids)
        self.reference = self._predictions(hidden, weights)
        again = self._hidden(plain, weights, 0)
        # A family that adds positions to what enters its first layer would add them again; then everything is run.
        self.can_reenter = float((again - hidden).abs().max()) <= REENTRY_ERROR * float(hidden.abs().max())

    def divergence(self, candidate: Candidate, first: int) -> float:
        """Summed KL of a candidate whose layers before `first` (-1: nor the embedding) are the teacher's."""
        first = first if self.can_reenter else -1
        tail = replace(candidate, layers=candidate.layers[max(0, first) :])
        weights = quantized_weights(_from_layer(self.weights, max(0, first)), tail)
        predicted = self._predictions(self._hidden(tail, weights, first), weights)
        return float(F.kl_div(predicted, self.reference, reduction="sum", log_target=True))

    def _hidden(self, tail: Candidate, weights: Weights, first: int) -> torch.Tensor:
        network = self.networks(len(tail.layers))
        with network.activations(tail):
            return network.hidden(weights, self.ids, None if first < 0 else self.entered[first])

    def _predictions(self, hidden: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Log-probabilities [valid positions, vocab]."""
        logits = F.linear(hidden[:, :-1][self.valid], weights.get(HEAD, weights[EMBEDDING]))
        return F.log_softmax(logits.float(), -1)


@contextmanager
def _watching(network: Network, entered: list[torch.Tensor]) -> Iterator[None]:
    def keep(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        entered.append(inputs[0])

    handles = [layer.register_forward_pre_hook(keep) for layer in network.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _from_layer(weights: Weights, first: int) -> dict[str, torch.Tensor]:
    """The weights without the layers before `first`, the others numbered anew."""
    found = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) < first:
                continue
            parts[2] = str(int(parts[2]) - first)
        found[".".join(parts)] = value
    return found
