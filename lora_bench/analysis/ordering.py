"""The order of a table's rows, the best values in it, and the rows that are shown."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, UserError, nearest

if TYPE_CHECKING:
    from lora_bench.analysis.table import Column, Row, Table


def mark_best(table: Table) -> list[Row]:
    """Return the rows, recommended ones first on their data, with the best value of each metric on the data marked.

    Only settings that stand for their method are marked, so that no value is best by the choice of many.
    """
    metrics = [column for column in table.columns if column.format == "metric" and column.arrow]
    blocks: dict[str | None, list[Row]] = {}
    for row in table.rows:
        blocks.setdefault(row.data, []).append(row)
    rows = []
    for block in blocks.values():
        tops: dict[str, float] = {}
        for column in metrics:
            means = [row.stats[column.name].mean for row in block if row.chosen and column.name in row.stats]
            if len(means) > 1:
                tops[column.name] = max(means) if column.arrow == "↑" else min(means)
        for row in sorted(block, key=lambda row: not row.recommended):
            best = {name for name, top in tops.items() if name in row.stats and row.stats[name].mean == top}
            rows.append(replace(row, best=frozenset(best if row.chosen else ())))
    return rows


def sort_rows(table: Table, by: str | None) -> Table:
    """Return the table sorted by one of its columns: metrics best first, costs and keys from the smallest on.

    Rows without a value come last. None leaves the order unchanged.

    Raises:
        UserError: there is no such column.
    """
    if by is None:
        return table
    columns = [*table.columns]
    column = next((c for c in columns if c.format != "interval" and c.name == by), None)
    column = column or next((c for c in columns if c.format != "interval" and c.name.rsplit("/", 1)[-1] == by), None)
    if column is None:
        names = [c.name for c in columns if c.format != "interval"]
        remedy = nearest(by, names)
        remedy = remedy if remedy.startswith("Did") else f"Columns: {', '.join(names)}."
        raise UserError("is no column of this table", key="--sort", value=by, remedy=remedy, code=Code.UNKNOWN_KEY)
    return replace(table, rows=sorted(table.rows, key=lambda row: _sort_key(row, column)))


def _sort_key(row: Row, column: Column) -> tuple[bool, bool, float, str]:
    """Return a key that sorts numbers before texts, and rows without a value last."""
    value: Any = row.keys.get(column.name)
    if column.format != "key":
        stat = row.stats.get(column.name)
        value = None if stat is None else -stat.mean if column.arrow == "↑" else stat.mean
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    text = "" if is_number or value is None else json.dumps(value, sort_keys=True)
    return value is None, not is_number, value if is_number else 0.0, text


def limit(table: Table, top: int | None) -> Table:
    """Return the table with its first `top` rows, and a note about the others."""
    if top is None or len(table.rows) <= top:
        return table
    note = f"{top} of {len(table.rows)} rows are shown (--top)"
    return replace(table, rows=table.rows[:top], notes=[*table.notes, note])
