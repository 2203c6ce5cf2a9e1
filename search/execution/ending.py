"""What a search tells the service that has started it: the error it ends with, as data.

The service hands over an open file that lies in memory, so that it also arrives from a full disk, where no log can be written.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass

from paretune.common.errors import ParetuneError, Shortage
from paretune.common.text import clean

VARIABLE = "PARETUNE_ENDING"
MOST_BYTES = 64 * 1024
MOST_TEXT = 4000
_handles: list[int] = []


@dataclass(frozen=True)
class Told:
    """`passes`: the machine lacked something, and the same search goes on when it has it again."""

    problem: str
    remedy: str = ""
    passes: bool = False


def take() -> None:
    """Take the service's file out of the environment, so that no child of ours writes into it."""
    value = os.environ.pop(VARIABLE, "")
    if value.isdecimal():
        with contextlib.suppress(OSError):
            os.set_inheritable(int(value), False)
            _handles.append(int(value))


def tell(error: ParetuneError) -> None:
    """Write the error for the service, if one has started us."""
    told = Told(clean(error.problem)[:MOST_TEXT], clean(error.remedy)[:MOST_TEXT], isinstance(error, Shortage))
    for handle in _handles:
        with contextlib.suppress(OSError):
            os.pwrite(handle, json.dumps(asdict(told)).encode(), 0)


def read(handle: int) -> Told | None:
    """What a search has told; None if it has told nothing."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Told(**json.loads(os.pread(handle, MOST_BYTES, 0)))
    return None
