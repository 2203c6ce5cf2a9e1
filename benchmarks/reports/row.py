"""A row of the table: what is right, what was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.reports.world import Ended, World


@dataclass(frozen=True)
class Seen:
    """`ok` None: this machine cannot make the row's circumstances."""

    right: str
    seen: str
    ok: bool | None

    @classmethod
    def equal(cls, right: object, seen: object) -> Seen:
        return cls(str(right), str(seen), right == seen)

    @classmethod
    def runs(cls, ended: Ended, right: str = "exit 0 or 3, a front") -> Seen:
        """Whether a search came to an end with a front: 3 says that no student was confirmed in its minute."""
        return cls(right, f"exit {ended.code} after {ended.seconds:.0f} s: {ended.tail()}", ended.code in (0, 3))

    def also(self, what: str, ok: bool) -> Seen:
        return Seen(self.right, f"{self.seen}; {what}", None if self.ok is None else self.ok and ok)


@dataclass(frozen=True)
class Row:
    number: int
    name: str
    run: Callable[[World], Seen]
