"""Calibrated methods over a whole student: one run of the calibration text, every matrix treated as its inputs pass.

Inputs are those of the student as it is given, not of one whose earlier layers are already changed; that keeps it to one
pass, and the matrices independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from paretune.compression.hessian import gram_of
from paretune.compression.network.inputs import each_input
from paretune.compression.network.student import ATTENTION, EMBEDDING, FFN, Network, matmul_formats
from paretune.compression.prune.sparsegpt import sparsegpt
from paretune.compression.quantize.clip import search_scales
from paretune.compression.quantize.gptq import gptq
from paretune.compression.quantize.grid import Quantized, quantize
from paretune.compression.quantize.per_tensor import static_scale
from paretune.spaces.candidate import Candidate, Format, Pattern

Weights = Mapping[str, torch.Tensor]


def calibrated_codes(
    network: Network, weights: Weights, candidate: Candidate, ids: torch.Tensor
) -> dict[str, Quantized]:
    """Codes of every matrix whose format needs calibration text, by weight name; nothing is run if none does.

    `weights` are the student's, masked and unquantized. In a sparse layer whatever is zero stays zero.
    """
    found: dict[str, Quantized] = {}
    if not candidate.needs_calibration:
        return found
    forms, patterns = matmul_formats(candidate), _patterns(candidate)

    def use(names: tuple[str, ...], x: torch.Tensor) -> None:
        form = forms[names[0]]
        if not form.needs_calibration:
            return
        rows = torch.cat([weights.get(name, weights[EMBEDDING]) for name in names])  # only a tied head has no weight
        mask = rows != 0 if patterns.get(names[0], Pattern()).kind != "none" else None
        whole, start = _codes(rows, form, x, mask), 0
        for name in names:
            end = start + len(weights.get(name, weights[EMBEDDING]))
            found[name] = replace(whole, codes=whole.codes[start:end], scales=whole.scales[start:end])
            start = end

    each_input(network, weights, ids, use)
    return found


def _codes(rows: torch.Tensor, form: Format, x: torch.Tensor, mask: torch.Tensor | None) -> Quantized:
    """Codes of `rows` [N, K] by the format's algorithm, with the scale of its static activations, from the inputs x [..., K]."""
    if form.algorithm == "gptq":
        found = gptq(rows, gram_of(x), form, mask)
    elif form.algorithm == "clip":
        found = search_scales(rows, form, x.float().square().flatten(0, -2).mean(0))
    else:
        found = quantize(rows, form)
    return replace(found, input_scale=static_scale(x)) if form.activation == "static" else found


def sparsegpt_weights(
    network: Network, weights: Weights, candidate: Candidate, ids: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(mask, compensated weight) of every matrix whose pattern is scored by SparseGPT, by weight name."""
    patterns = {name: pattern for name, pattern in _patterns(candidate).items() if pattern.score == "sparsegpt"}
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if not patterns:
        return found

    def use(names: tuple[str, ...], x: torch.Tensor) -> None:
        if names[0] in patterns:
            gram = gram_of(x)
            found.update({name: sparsegpt(weights[name], gram, patterns[name]) for name in names})

    each_input(network, weights, ids, use)
    return found


def _patterns(candidate: Candidate) -> dict[str, Pattern]:
    return {
        f"model.layers.{i}.{name}.weight": layer.pattern
        for i, layer in enumerate(candidate.layers)
        for name in (*ATTENTION, *FFN)
    }
