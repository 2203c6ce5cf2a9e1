"""Mixed precision: what each matrix loses in each format, and the assignment of formats that a number of bits buys.

One number, the mean bits per weight with the scales counted (`effective_bits`), stands for a format per layer and matrix
group. Losses are taken to add up, as they nearly do while they are small (HAWQ-V3, arXiv 2011.10680), so the best assignment
is a knapsack. The table is the teacher's; a smaller student looks its layers up by where they came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from paretune.spaces.candidate import PER_CHANNEL, Candidate, Format, Shape, group_for, shares_table
from paretune.spaces.knapsack import knapsack

SCALE_BITS = 32
Losses = tuple[float, ...]
Widths = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sensitivity:
    """Loss (KL to the teacher in nats/token, at least 0) when one matrix group alone is in `formats[j]`, at [.., j].

    `attention` and `ffn` have a row per teacher layer. `order` lists the teacher's layers, most important first, as a student
    of fewer layers keeps them; empty where no layer is cut.
    """

    formats: tuple[Format, ...]
    attention: tuple[Losses, ...]
    ffn: tuple[Losses, ...]
    head: Losses
    embedding: Losses
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        rows = (*self.attention, *self.ffn, self.head, self.embedding)
        if len(self.attention) != len(self.ffn) or any(len(row) != len(self.formats) for row in rows):
            raise ValueError(
                f"the table must have {len(self.formats)} losses in every row and as many rows for attention as for FFN, but got "
                f"{len(self.attention)} and {len(self.ffn)} rows of {sorted({len(row) for row in rows})}"
            )
        if not all(math.isfinite(loss) and loss >= 0 for row in rows for loss in row):
            raise ValueError("every loss of the table must be finite and at least 0, but some are not")

    def kept_layers(self, depth: int) -> list[int]:
        """The teacher's layers that a student of `depth` layers has, in their order."""
        return sorted((self.order or tuple(range(len(self.ffn))))[:depth])

    def worst(self) -> tuple[str, Format, float]:
        """What loses most: (matrix group, format, loss)."""
        named = {f"layer {i} {name}": row for name in ("attention", "ffn") for i, row in enumerate(getattr(self, name))}
        named |= {"head": self.head, "embedding": self.embedding}
        name, j = max(((n, j) for n, row in named.items() for j in range(len(row))), key=lambda x: named[x[0]][x[1]])
        return name, self.formats[j], named[name][j]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as a dictionary; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Return the table of a parsed JSON object. Raises KeyError or ValueError if it is none."""
        return cls(
            tuple(Format(**f) for f in data["formats"]),
            tuple(map(tuple, data["attention"])),
            tuple(map(tuple, data["ffn"])),
            tuple(data["head"]),
            tuple(data["embedding"]),
            tuple(data["order"]),
        )


def mix(candidate: Candidate, table: Sensitivity, shape: Shape, hidden: int, effective_bits: float) -> Candidate:
    """The `candidate` with the formats of least summed loss within `effective_bits`; those it had do not matter.

    `hidden` is the student's own. If even the cheapest formats take more bits, those are chosen.
    """
    widths = tuple((layer.ffn, layer.kv_groups) for layer in candidate.layers)
    table = replace(table, formats=tuple(_repaired(f, hidden) for f in table.formats))
    taken = [table.formats[j] for j in _assign(table, widths, shape, hidden, effective_bits)]
    layers = tuple(
        replace(layer, attention_format=taken[2 * i], ffn_format=taken[2 * i + 1])
        for i, layer in enumerate(candidate.layers)
    )
    return replace(candidate, layers=layers, head_format=taken[-2], embedding_format=taken[-1])


def mean_bits(candidate: Candidate, shape: Shape, hidden: int) -> float:
    """Stored bits per weight, with scales. A tied table that is stored twice counts twice in bits, once in weights."""
    attention, ffn = zip(*(_layer_matrices(shape, hidden, x.ffn, x.kv_groups) for x in candidate.layers), strict=True)
    table = [(shape.vocab, hidden)]
    bits = sum(stored_bits(x.attention_format, m) for x, m in zip(candidate.layers, attention, strict=True))
    bits += sum(stored_bits(x.ffn_format, m) for x, m in zip(candidate.layers, ffn, strict=True))
    bits += _table_bits(candidate.head_format, candidate.embedding_format, table, shape.tied)
    return bits / _weights([*attention, *ffn, table, *([] if shape.tied else [table])])


def stored_bits(form: Format, matrices: Iterable[tuple[int, int]]) -> int:
    """Bits of matrices [rows, K]: the codes, and a float32 scale per group; groups are repaired to what divides K."""
    if form.bits >= 16:
        return sum(rows * k * form.bits for rows, k in matrices)
    return sum(rows * (k * form.bits + k // group_for(form.group_size, k) * SCALE_BITS) for rows, k in matrices)


def _repaired(form: Format, hidden: int) -> Format:
    """As a candidate of that width has it, so that what is counted is what is stored."""
    if not form.is_integer or form.group_size == PER_CHANNEL:
        return form
    return replace(form, group_size=group_for(form.group_size, hidden))


@lru_cache(maxsize=8192)
def _assign(table: Sensitivity, widths: Widths, shape: Shape, hidden: int, effective_bits: float) -> tuple[int, ...]:
    """Index of the format of (attention, FFN) of every layer, head and embedding, in this order."""
    forms, kept = table.formats, table.kept_layers(len(widths))
    items, matrices = [], []
    for old, (ffn, groups) in zip(kept, widths, strict=True):
        for losses, found in zip(
            (table.attention[old], table.ffn[old]), _layer_matrices(shape, hidden, ffn, groups), strict=True
        ):
            items.append([(stored_bits(f, found), loss) for f, loss in zip(forms, losses, strict=True)])
            matrices.append(found)
    both = [(shape.vocab, hidden)]
    n, matrices = len(forms), [*matrices, both, *([] if shape.tied else [both])]
    pairs = [(h, e) for h in range(n) for e in range(n)]
    items.append(
        [(_table_bits(forms[h], forms[e], both, shape.tied), table.head[h] + table.embedding[e]) for h, e in pairs]
    )
    *layers, last = knapsack(items, math.floor(effective_bits * _weights(matrices)))
    return (*layers, *pairs[last])


def _table_bits(head: Format, embedding: Format, table: list[tuple[int, int]], tied: bool) -> int:
    """Bits of head and embedding, which are one table where they are tied and of one grid."""
    if tied and shares_table(head, embedding):
        return stored_bits(head, table)
    return stored_bits(head, table) + stored_bits(embedding, table)


def _layer_matrices(
    shape: Shape, hidden: int, ffn: int, kv_groups: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """[rows, K] of q, k, v, o and of gate (where there is one), up, down."""
    kv = kv_groups * shape.head_dim
    q = kv * shape.heads_per_group
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)], [
        *[(ffn, hidden)] * (2 if shape.gated else 1),
        (hidden, ffn),
    ]


def _weights(matrices: Iterable[Iterable[tuple[int, int]]]) -> int:
    return sum(rows * k for group in matrices for rows, k in group)
