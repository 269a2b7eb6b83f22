"""A table of runs on a terminal: within its width there, at full width in a file or a pipe.

What has no room goes: costs first, then a digit, then metrics; then keys share a column, and at last cells are folded.
Rows are laid out here, since rich's own tables take half a second for a thousand rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from lora_bench.analysis.table import Column, cell, visible
from lora_bench.console.format import to_single_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lora_bench.analysis.table import Table

GAP = 2
"""Spaces between columns."""


def render(table: Table, console: Console) -> None:
    """Print the table, those beside it, and what stands below."""
    from rich.text import Text

    if table.rows:
        _print(table, console)
    for each in table.beside:
        console.print()
        _print(each, console)
    for i, line in enumerate(table.below):
        console.print(
            Text("\n" * (i == 0 and bool(table.rows)) + to_single_line(line)), soft_wrap=not console.is_terminal
        )


def _print(table: Table, console: Console) -> None:
    from rich.text import Text

    width = console.width if console.is_terminal else sys.maxsize  # rich takes any file for 80 columns wide
    grid, hidden = _fitted(table, width)
    console.print(Text("\n").join(grid.lines(width)), soft_wrap=True)
    if hidden:
        names = ", ".join(to_single_line(column.name) for column in hidden)
        console.print(Text(f"\nwiden the terminal or use --format md for: {names}", style="dim"))


def _fitted(table: Table, width: int) -> tuple[_Grid, list[Column]]:
    """The fullest form within the width, and the columns that it leaves out."""
    columns = visible(table)
    keys = [column for column in columns if column.kind == "key"]
    optional = sorted((c for c in columns if c.kind not in ("key", "n")), key=lambda column: column.keep)[:-1]
    costs = sum(column.kind != "metric" for column in optional)
    steps = [(i, 4) for i in range(costs + 1)] + [(i, 3) for i in range(costs, len(optional) + 1)]

    @cache
    def cells(column: Column, digits: int) -> list[str]:
        return [column.header, *(cell(row, column, digits) for row in table.rows)]

    named = [[f"{to_single_line(c.name)}={cell(row, c)}" for c in keys if c.name in row.keys] for row in table.rows]
    together = ["run", *map("\n".join, named)]
    for stacked in (False, True):
        for dropped, digits in steps:
            hidden = [column for column in columns if column in optional[:dropped]]
            shown = [column for column in columns if column not in hidden and not (stacked and column in keys)]
            sides = [together] * stacked + [cells(column, digits) for column in shown]
            names = [""] * stacked + [column.name for column in shown]
            best = [[name in row.best for name in names] for row in table.rows]
            grid = _Grid(list(zip(*sides, strict=True)), best, left=1 if stacked else len(keys))
            if grid.width <= width:
                return grid, hidden
    return grid, hidden


@dataclass(frozen=True)
class _Grid:
    """Cells in columns, the header first."""

    rows: list[tuple[str, ...]]
    bold: list[list[bool]]
    """Of each row but the header's, whether a cell is."""
    left: int
    """How many columns stand at their left edge; the others, of numbers, at their right."""

    @cached_property
    def widths(self) -> list[int]:
        """Of each column."""
        from rich.cells import cell_len

        return [
            max(cell_len(line) for text in column for line in text.split("\n"))
            for column in zip(*self.rows, strict=True)
        ]

    @property
    def width(self) -> int:
        return sum(self.widths) + GAP * (len(self.widths) - 1)

    def lines(self, width: int) -> list[Text]:
        """The grid with a rule below its header; where it is wider than `width`, its widest cells are folded."""
        from rich.text import Text

        widths = self.widths
        if self.width > width:
            room = width - GAP * (len(widths) - 1)
            caps = (cap for cap in range(max(widths), 1, -1) if sum(min(each, cap) for each in widths) <= room)
            cap = next(caps, 2)  # a wide character takes two
            widths = [min(each, cap) for each in widths]
        header, *rows = self.rows
        rule = Text("─" * (sum(widths) + GAP * (len(widths) - 1)))
        below = [line for row, bold in zip(rows, self.bold, strict=True) for line in self._row(row, bold, widths)]
        return [*self._row(header, [True] * len(header), widths), rule, *below]

    def _row(self, cells: tuple[str, ...], bold: list[bool], widths: list[int]) -> list[Text]:
        from rich.cells import cell_len, chop_cells
        from rich.text import Text

        parts = [
            [piece for line in text.split("\n") for piece in (chop_cells(line, width) if line else [""])]
            for text, width in zip(cells, widths, strict=True)
        ]
        made = []
        for i in range(max(map(len, parts))):
            line = Text()
            for j, (pieces, width) in enumerate(zip(parts, widths, strict=True)):
                piece = pieces[i] if i < len(pieces) else ""
                pad = " " * (width - cell_len(piece))
                line.append(" " * GAP if j else "").append(pad if j >= self.left else "")
                line.append(piece, "bold" if bold[j] else None).append(pad if j < self.left else "")
            made.append(line)
        return made
