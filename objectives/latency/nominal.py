"""Where a machine keeps what the reference takes on it when nothing disturbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from paretune.common.files import read_kept, warn_damaged, write_atomically
from paretune.objectives.latency.benchmark import Nominal


def kept_in(path: Path) -> Callable[[Nominal | None], Nominal | None]:
    """Return the `nominal` of a LatencyBenchmark, a function that reads `path`; given figures it writes them first."""

    def nominal(value: Nominal | None) -> Nominal | None:
        if value is not None:
            write_atomically(path, json.dumps(value.__dict__).encode())
        return _read(path)

    return nominal


def _read(path: Path) -> Nominal | None:
    """The kept figures; None if they are not there or damaged."""
    found = read_kept(path)
    try:
        return None if found is None else Nominal(**{name: float(value) for name, value in found.items()})
    except (AttributeError, TypeError, ValueError) as error:
        warn_damaged(path, error)
        return None
