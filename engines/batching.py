"""Which windows of text are scored together: windows of like length, so that hardly any padding is computed.

A causal model's losses do not depend on what stands behind a token, so windows are padded behind and cut to the longest of
their batch: nothing attends across documents, and a document's NLL is the same in whatever company it is scored.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

# The shortest window of a batch has at least this share of the longest's tokens.
LEAST_FILL = 0.75


def even_batches(
    targets: npt.NDArray[np.int64], most_tokens: int, exact: bool = False
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """(indices of windows, tokens of the longest of them), the longest windows first, until every window came once.

    Window i has `targets[i]` + 1 tokens. A batch, padding counted, has at most `most_tokens` tokens unless it is a single window.
    `exact`: only windows of one length share a batch, for models whose rounding of a sequence would see the padding.
    """
    lengths = np.asarray(targets, np.int64) + 1
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        least = longest if exact else LEAST_FILL * longest
        stop = start + max(1, most_tokens // longest)
        chosen = order[start:stop]
        chosen = chosen[: int((lengths[chosen] >= least).sum())]
        yield chosen, longest
        start += len(chosen)
