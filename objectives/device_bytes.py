"""Bytes of weights and of KV cache that one device holds of a candidate that is divided among several."""

from __future__ import annotations

import math

from paretune.objectives.parallel import split_candidate
from paretune.spaces.candidate import Candidate, Layer, Shape, shares_table
from paretune.spaces.mixed import stored_bits
from paretune.teachers.families import axis_sizes, family_of


def weight_bytes(candidate: Candidate, shape: Shape, degree: int = 1) -> float:
    """Bytes of one device's weights with their scales, of the device that has most. Norms, biases and positions are float32;
    norms and positions are on every device.

    Raises Infeasible where the candidate cannot be divided so.
    """
    part = split_candidate(candidate, shape, degree)
    rows = -(-shape.vocab // degree)
    return sum(_layer_bits(layer, part, shape) for layer in part.layers) / 8 + _table_bits(part, shape, rows) / 8


def cache_bytes(
    candidate: Candidate, shape: Shape, tokens: int, degree: int = 1, batch: int = 1, value_bytes: float = 4.0
) -> float:
    """Bytes of one device's keys and values for `batch` sequences of `tokens`."""
    part = split_candidate(candidate, shape, degree)
    values = 2 * sum(layer.kv_groups for layer in part.layers) * shape.head_dim
    return values * tokens * batch * value_bytes


def stage_bytes(
    candidate: Candidate, shape: Shape, tokens: int, batch: int = 1, value_bytes: float = 4.0
) -> list[float]:
    """Bytes of embedding, every layer with its cache, and head: what `pipeline_stages` distributes. A tied
    table is counted on both ends."""
    width = candidate.width(shape)
    embedding, head = (
        stored_bits(f, [(shape.vocab, width)]) / 8 for f in (candidate.embedding_format, candidate.head_format)
    )
    layers = [
        _layer_bits(layer, candidate, shape) / 8 + 2 * layer.kv_groups * shape.head_dim * tokens * batch * value_bytes
        for layer in candidate.layers
    ]
    return [embedding + 4 * shape.positions * width, *layers, head + _root_norms(shape, width) / 8]


def _layer_bits(layer: Layer, candidate: Candidate, shape: Shape) -> float:
    sizes = axis_sizes(shape, layer.ffn, layer.kv_groups, candidate.width(shape))
    bits = 0.0
    for name, axes in family_of(shape).layer_tensors.items():
        lengths = [sizes[axis] for axis in axes]
        form = layer.attention_format if name.startswith("self_attn") else layer.ffn_format
        bits += stored_bits(form, [(lengths[0], lengths[1])]) if len(lengths) == 2 else 32 * math.prod(lengths)
    return bits


def _table_bits(candidate: Candidate, shape: Shape, rows: int) -> float:
    """Embedding and head (one table where they share it), positions and the last norm."""
    width, head, embedding = candidate.width(shape), candidate.head_format, candidate.embedding_format
    one = shape.tied and shares_table(head, embedding)
    tables = [embedding] if one else [embedding, head]
    return (
        sum(stored_bits(form, [(rows, width)]) for form in tables)
        + 32 * shape.positions * width
        + _root_norms(shape, width)
    )


def _root_norms(shape: Shape, width: int) -> float:
    return 32 * width * sum(name.startswith("model.norm") for name in family_of(shape).root_tensors)
