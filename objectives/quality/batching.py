"""How much text is looked at in one go: windows of 256 tokens, and as many of them as memory for their logits allows."""

from __future__ import annotations

from paretune.spaces.candidate import Shape

WINDOW = 256
MOST_LOGITS = 2**25


def batch_within_memory(wanted: int, window: int, shape: Shape) -> int:
    """`wanted` windows, or fewer where their logits would pass 32M numbers, of which training keeps several; at least one."""
    return max(1, min(wanted, MOST_LOGITS // (window * shape.vocab)))
