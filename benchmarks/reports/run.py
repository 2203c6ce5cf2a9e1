"""Run the rows and say what was seen."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Figure, figure
from benchmarks.reports import environments, models, texts
from benchmarks.reports.row import Row, Seen
from benchmarks.reports.world import World

ROWS: tuple[Row, ...] = tuple(sorted((*models.ROWS, *texts.ROWS, *environments.ROWS), key=lambda row: row.number))


def reports() -> Iterator[Figure]:
    """Rows of strangers' inputs that end with the right value, of those that this machine can make."""
    wanted = {int(number) for number in os.environ.get("ROWS", "").split(",") if number}
    rows = [row for row in ROWS if not wanted or row.number in wanted]
    found = []
    for row in rows:
        seen = _run(row)
        found.append(seen)
        verdict = {True: "right", False: "WRONG", None: "not shown"}[seen.ok]
        yield figure(
            f"reports.{row.number:02}",
            float(bool(seen.ok)),
            "1",
            row=row.name,
            right=seen.right,
            seen=seen.seen,
            verdict=verdict,
        )
    right = sum(bool(seen.ok) for seen in found)
    yield figure("reports", right, "rows", of=len(found), not_shown=sum(seen.ok is None for seen in found))


def _run(row: Row) -> Seen:
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as folder:
        try:
            seen = row.run(World(Path(folder)))
        except (
            KeyError,
            IndexError,
            ValueError,
            OSError,
            StopIteration,
        ) as error:  # the program's answer had another form
            seen = Seen("an answer", f"{type(error).__name__}: {error}", False)
    print(f"row {row.number}: {row.name}: {seen}", file=sys.stderr, flush=True)
    return seen
