"""Texts in columns: within the width of a terminal there, in full elsewhere. A thousand rows take some milliseconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from lora_bench.console.text import sanitise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

GAP = 2
"""Spaces between columns."""


@dataclass(frozen=True)
class TextColumn:
    """A column of texts.

    Args:
        header: its first line.
        cells: its other lines; untrusted texts are allowed.
        is_number: align it right.
        min_width: cells in terminal that may be shortened to; None: the column is never shortened or left out.
    """

    header: str
    cells: Sequence[str]
    is_number: bool = False
    min_width: int | None = None


def print_columns(console: Console, columns: Sequence[TextColumn]) -> None:
    """Print columns below their headers, each row in one line; columns without any text are left out."""
    header, *rows = lay_out(columns, available_width(console))
    console.print(Text("\n").join([Text(header, "bold"), *map(Text, rows)]), soft_wrap=True)


def available_width(console: Console) -> int | None:
    """Return the width to print within; None in a file or pipe, unless the environment variable COLUMNS gives one."""
    if console.is_terminal:
        return console.width
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else None


def lay_out(columns: Sequence[TextColumn], width: int | None) -> list[str]:
    """Return the header and the rows as lines; columns without any text are left out.

    If the lines are wider than `width`, columns that may be shortened and say the same of all rows are left out, then
    the last columns that do not fit, and then the widest of the columns that may be shortened lose characters. A
    shortened text ends with `…`.
    """
    filled = [column for column in columns if any(column.cells)]
    texts = [[column.header, *(sanitise(cell).plain for cell in column.cells)] for column in filled]
    widths = [max(map(cell_len, cells)) for cells in texts]
    if width is not None:
        for i in reversed(range(len(filled))):
            is_uniform = len(filled[i].cells) > 1 and len(set(filled[i].cells)) == 1
            if is_uniform and filled[i].min_width is not None and sum(widths) + GAP * (len(widths) - 1) > width:
                del filled[i], texts[i], widths[i]
        widths = _fitted(widths, [column.min_width for column in filled], width)
    lines = []
    for row in zip(*texts, strict=True):
        cells = [
            _padded(_shortened(cell, size), size, column.is_number)
            for cell, size, column in zip(row, widths, filled, strict=False)  # without the columns that do not fit
        ]
        lines.append((" " * GAP).join(cells).rstrip())
    return lines


def _fitted(widths: Sequence[int], min_widths: Sequence[int | None], available: int) -> list[int]:
    """Return the widths of as many of the first columns as fit; those with a minimum are reduced, the widest first."""
    least = [size if low is None else min(size, low) for size, low in zip(widths, min_widths, strict=True)]
    number = len(least)
    while number > 1 and sum(least[:number]) + GAP * (number - 1) > available:
        number -= 1
    fitted = list(widths[:number])
    while sum(fitted) + GAP * (number - 1) > available and fitted != least[:number]:
        reducible = [i for i in range(number) if fitted[i] > least[i]]
        fitted[max(reducible, key=lambda i: fitted[i])] -= 1
    return [min(size, available) for size in fitted]


def _shortened(text: str, width: int) -> str:
    """Return a text within a width in terminal cells; what is cut off is replaced by `…`."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _padded(text: str, width: int, is_number: bool) -> str:
    """Return a text with spaces up to a width in terminal cells, before it if it is a number."""
    spaces = " " * (width - cell_len(text))
    return spaces + text if is_number else text + spaces
