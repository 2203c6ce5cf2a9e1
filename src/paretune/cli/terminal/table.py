"""A table that never cuts a number: columns leave by importance where the screen is too narrow, and it says which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

# What a column takes beside its text: a space on both sides and a line.
FRAME = 3
LEAST_FOLDED = 10


@dataclass(frozen=True)
class Column:
    """`rank` 0 always stays; of the others the highest leaves first. One that `folds` is wrapped, the others are shown whole."""

    title: str
    right: bool = True
    rank: int = 0
    folds: bool = False


@dataclass(frozen=True)
class FittedTable:
    """Rows of texts, a cell for each column. Where not even the columns of rank 0 fit, every row becomes lines `column: text`."""

    columns: tuple[Column, ...]
    rows: tuple[Sequence[str], ...]
    title: str = ""
    caption: str = ""

    def shown(self, width: int) -> tuple[int, ...]:
        """Which columns are shown on a screen of `width` characters, by their place."""
        kept = list(range(len(self.columns)))
        while self._least(kept) > width and (further := [i for i in kept if self.columns[i].rank]):
            kept.remove(max(further, key=lambda i: (self.columns[i].rank, i)))
        return tuple(kept)

    def _least(self, kept: Sequence[int]) -> int:
        return 1 + sum(FRAME + self._width(i) for i in kept)

    def _width(self, i: int) -> int:
        """The least width of a column."""
        texts = [self.columns[i].title, *(row[i] for row in self.rows)]
        widest = max(map(cell_len, texts))
        return min(widest, LEAST_FOLDED) if self.columns[i].folds else widest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        kept = self.shown(options.max_width)
        if self._least(kept) <= options.max_width:
            yield self._table(kept)
        else:
            yield from self._lines(kept)
        left_out = [self.columns[i].title for i in range(len(self.columns)) if i not in kept]
        if left_out:
            yield Text(
                f"not shown in {options.max_width} columns: {', '.join(left_out)}; a wider terminal, a pipe or --json has all"
            )

    def _table(self, kept: Sequence[int]) -> Table:
        table = Table(
            title=self.title or None, caption=self.caption or None, caption_justify="left", title_justify="left"
        )
        for column in (self.columns[i] for i in kept):
            table.add_column(
                column.title,
                justify="right" if column.right else "left",
                no_wrap=not column.folds,
                overflow="fold",
                min_width=None if column.folds else 1,
            )
        for i, number in enumerate(kept):
            table.columns[i].min_width = self._width(number)
        for row in self.rows:
            table.add_row(*(row[i] for i in kept))
        return table

    def _lines(self, kept: Sequence[int]) -> Iterator[Text]:
        if self.title:
            yield Text(self.title)
        for row in self.rows:
            for i in kept:
                if row[i]:
                    yield Text(f"{self.columns[i].title or '-'}: {row[i]}", overflow="fold")
            yield Text("")
