"""Candidates that every search should have seen."""

from __future__ import annotations

from dataclasses import replace

from paretune.spaces.candidate import Candidate
from paretune.spaces.kinds import AnyCandidate, AnySpace
from paretune.spaces.module_space import ModuleSpace


def textbook_candidates(space: AnySpace) -> list[AnyCandidate]:
    """Each size cut alone and together, each with the engine's two integer precisions and two mixed ones; without repetitions."""
    if isinstance(space, ModuleSpace):
        return list(space.seeds())
    s = space.shape
    found: list[Candidate] = []
    widths = space.ffn_widths
    sizes = [
        (s.layers, widths[-1], s.kv_heads),
        (s.layers - 1, widths[-1], s.kv_heads),
        (s.layers, widths[len(widths) // 2], s.kv_heads),
        (s.layers - 1, widths[2 * len(widths) // 3], s.kv_heads),
        (max(space.min_depth, 2 * s.layers // 3), widths[-1], s.kv_heads),
    ]
    for depth, ffn, groups in sizes:
        for bits, head, embedding in ((8, 8, 8), (4, 8, 8), (4, 4, 8)):
            if depth < space.min_depth or not {bits, head, embedding} <= set(space.bits):
                continue
            index = {b: i for i, b in enumerate(space.bits)}
            params = {
                "depth": depth,
                "ffn": widths.index(ffn),
                "kv_groups": groups,
                "pattern": "none",
                "ratio": 0,
                "score": "magnitude",
                "attention_bits": index[bits],
                "ffn_bits": index[bits],
                "head_bits": index[head],
                "embedding_bits": index[embedding],
                "group_size": 0,
            }
            found.append(space.decode(params))
        if space.sensitivity is not None and depth >= space.min_depth:
            levels = len(space.effective_bits)
            for level in (levels // 5, levels // 2):  # about 5 and 6 bits
                changed = {"depth": depth, "ffn": widths.index(ffn), "kv_groups": groups, "effective_bits": level}
                base = space.encode(space.baselines()[0]) | {"precision_mode": "mixed"}
                found.append(space.decode(base | changed))
    if len(space.hidden_widths) > 1:  # uniform ones: what a number of bits buys is another mixture at another width
        narrower, full = space.hidden_widths[-2], [c for c in found if c.is_full_size(s)]
        found += [replace(c, hidden=narrower).canonical(s) for c in full if len(set(c.layers)) == 1]
    return list(dict.fromkeys(found))
