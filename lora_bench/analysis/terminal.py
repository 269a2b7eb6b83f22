"""A table of runs on a terminal: within its width there; in a file or a pipe within `COLUMNS`, else at full width.

If the width does not suffice, costs are dropped first, then a digit, then metrics; then keys share a column, and at
last cells are folded. Rows are laid out here because rich's own tables take half a second for a thousand rows.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from lora_bench.analysis.table import Column, format_cell, visible_columns
from lora_bench.console.format import to_single_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lora_bench.analysis.table import Row, Table

GAP = 2
"""Spaces between columns."""


def render(table: Table, console: Console) -> None:
    """Print the table, its side tables, its footnotes, and at last its advice."""
    from rich.text import Text

    soft_wrap = _width(console) == sys.maxsize
    if not soft_wrap:
        console.width = _width(console)
    if table.rows:
        _print(table, console)
    for side_table in table.side_tables:
        console.print()
        _print(side_table, console)
    for i, line in enumerate(table.footnotes):
        console.print(Text("\n" * (i == 0 and bool(table.rows)) + to_single_line(line)), soft_wrap=soft_wrap)
    if table.advice:
        console.print()
    for sentence in table.advice:
        console.print(Text(to_single_line(sentence), style="bold"), soft_wrap=soft_wrap)


def _print(table: Table, console: Console) -> None:
    """Print one table, and which columns are hidden."""
    from rich.text import Text

    width = _width(console)
    grid, hidden = _fitted(table, width)
    console.print(Text("\n").join(grid.lines(width)), soft_wrap=True)
    if hidden:
        names = ", ".join(to_single_line(column.name) for column in hidden)
        console.print(Text(f"\nhidden columns (widen the terminal, or use --format md): {names}", style="dim"))


def _width(console: Console) -> int:
    """Return the width to print within; a file or pipe has none, unless the environment variable COLUMNS gives it."""
    if console.is_terminal:
        return console.width
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else sys.maxsize


def _fitted(table: Table, width: int) -> tuple[_Grid, list[Column]]:
    """Return the fullest grid that fits the width, and the columns that it leaves out."""
    columns = visible_columns(table)
    keys = [column for column in columns if column.format == "key"]
    optional = sorted((c for c in columns if c.format not in ("key", "n")), key=lambda column: column.keep)[:-1]
    costs = sum(column.format != "metric" for column in optional)
    steps = [(i, 4) for i in range(costs + 1)] + [(i, 3) for i in range(costs, len(optional) + 1)]

    @cache
    def cells(column: Column, digits: int) -> list[str]:
        return [column.header, *(format_cell(row, column, digits) for row in table.rows)]

    overrides_by_row = [
        [f"{to_single_line(c.name)}={format_cell(row, c)}" for c in keys if c.name in row.keys] for row in table.rows
    ]
    stacked_keys = ["run", *map("\n".join, overrides_by_row)]
    for stacked in (False, True):
        for dropped, digits in steps:
            hidden = [column for column in columns if column in optional[:dropped]]
            remaining = [column for column in columns if column not in hidden and not (stacked and column in keys)]
            grid_columns = [stacked_keys] * stacked + [cells(column, digits) for column in remaining]
            names = [""] * stacked + [column.name for column in remaining]
            best = [[_is_bold(row, name, names, keys) for name in names] for row in table.rows]
            grid = _Grid(list(zip(*grid_columns, strict=True)), best, n_left=1 if stacked else len(keys))
            if grid.width <= width:
                return grid, hidden
    return grid, hidden


def _is_bold(row: Row, name: str, names: list[str], keys: list[Column]) -> bool:
    """Return whether a cell is bold: the best value of a metric, or the name of the recommended row."""
    is_key = name == "" or any(key.name == name for key in keys)
    return row.recommended if is_key else name in row.best


@dataclass(frozen=True)
class _Grid:
    """Cells in columns, the header first."""

    rows: list[tuple[str, ...]]
    bold: list[list[bool]]
    """Flags of the bold cells, for each row but the header."""
    n_left: int
    """Number of columns that are aligned left; the rest are numbers, aligned right."""

    @cached_property
    def widths(self) -> list[int]:
        """Width of each column in terminal cells."""
        from rich.cells import cell_len

        return [
            max(cell_len(line) for text in column for line in text.split("\n"))
            for column in zip(*self.rows, strict=True)
        ]

    @property
    def width(self) -> int:
        """Width of the grid in terminal cells."""
        return sum(self.widths) + GAP * (len(self.widths) - 1)

    def lines(self, width: int) -> list[Text]:
        """Return the grid with a rule below its header; the widest cells are folded if it is wider than `width`."""
        from rich.text import Text

        widths = self.widths
        if self.width > width:
            free_width = width - GAP * (len(widths) - 1)
            caps = (
                cap
                for cap in range(max(widths), 1, -1)
                if sum(min(column_width, cap) for column_width in widths) <= free_width
            )
            cap = next(caps, 2)  # a wide character takes two
            widths = [min(column_width, cap) for column_width in widths]
        header, *rows = self.rows
        rule = Text("─" * (sum(widths) + GAP * (len(widths) - 1)))
        lines = [line for row, bold in zip(rows, self.bold, strict=True) for line in self._row(row, bold, widths)]
        return [*self._row(header, [True] * len(header), widths), rule, *lines]

    def _row(self, cells: tuple[str, ...], bold: list[bool], widths: list[int]) -> list[Text]:
        """Return the lines of one row of cells, folded to the widths."""
        from rich.cells import cell_len, chop_cells
        from rich.text import Text

        pieces_by_column = [
            [piece for line in text.split("\n") for piece in (chop_cells(line, width) if line else [""])]
            for text, width in zip(cells, widths, strict=True)
        ]
        lines = []
        for i in range(max(map(len, pieces_by_column))):
            line = Text()
            for j, (pieces, width) in enumerate(zip(pieces_by_column, widths, strict=True)):
                piece = pieces[i] if i < len(pieces) else ""
                pad = " " * (width - cell_len(piece))
                line.append(" " * GAP if j else "").append(pad if j >= self.n_left else "")
                line.append(piece, "bold" if bold[j] else None).append(pad if j < self.n_left else "")
            lines.append(line)
        return lines
