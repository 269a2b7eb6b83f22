"""Entries and blocks: the rows of the table with names and colours, grouped by the data that they are comparable on."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.significance import BASELINE
from lora_bench.analysis.table import format_cell
from lora_bench.console.format import to_single_line
from lora_bench.report.charts import SERIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.analysis.table import Column, Row, Stat, Table


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    number: int
    """Number of the row in the table, from 0, which links a point of a chart to its row."""
    row: Row
    name: str
    method: str
    """Its choices alone (`lora`, `bert lora`), which rows share that differ in numbers only."""
    runs: list[tuple[Path, dict[str, Any]]]
    """Folder and record of each run, by seed."""
    series: int | None = None
    """Number of its colour and shape; None for an entry without them."""

    def stat(self, column: Column) -> Stat | None:
        """Return mean and spread of a column; None if the row has none."""
        return self.row.stats.get(column.name)

    @property
    def selection_mcc(self) -> float:
        """Mean MCC on the selection split, which chooses between rows; -inf if no run has it."""
        recorded = [record["metrics"].get("selection/mcc") for _, record in self.runs]
        numbers = [value for value in recorded if isinstance(value, int | float)]
        return statistics.fmean(numbers) if numbers else -math.inf

    @property
    def order(self) -> tuple[float, int]:
        """Sort key: best on the selection split first, then as in the table."""
        return -self.selection_mcc, self.number


@dataclass(frozen=True)
class Block:
    """The rows on one data set, best first."""

    name: str
    """Name of the data; empty if there is only one data set."""
    entries: list[Entry]
    main: Column
    """The metric that rows are ordered by."""
    costs: list[Column]
    """Columns of costs that some row has."""
    chosen: list[Entry]
    """At most `SERIES` entries: the best of each method by the selection split, or the best rows of a single method."""
    methods: dict[str, int]
    """Methods with a colour, and its number."""

    @property
    def baseline(self) -> Entry | None:
        """The entry that the others are tested against."""
        return next((e for e in self.entries if e.row.finding and e.row.finding.verdict == BASELINE), None)

    @property
    def tested(self) -> list[Entry]:
        """Entries with a verdict, best first."""
        return [entry for entry in self.entries if entry.row.finding and entry.row.finding.p_holm is not None]

    @property
    def chosen_how(self) -> str:
        """A sentence about `chosen`; empty if all entries are chosen."""
        if len(self.chosen) == len(self.entries):
            return ""
        subject = (
            "The best setting of each method" if len(self.methods) > 1 else f"The {len(self.chosen)} best settings"
        )
        by_selection = all(math.isfinite(entry.selection_mcc) for entry in self.chosen)
        return f"{subject}, by {'the selection split' if by_selection else self.main.name}, of {len(self.entries)}."


def group_blocks(table: Table) -> list[Block]:
    """Return the table's rows in blocks of comparable rows; a row without the main metric is left out."""
    main = [column for column in table.columns if column.format == "metric" and column.name.endswith("mcc")]
    if not main:
        return []
    settings_by_row = _distinguishing_settings(table)
    entries = [_entry(table, number, row, settings_by_row[number]) for number, row in enumerate(table.rows)]
    by_data: dict[str | None, list[Entry]] = {}
    for entry in entries:
        by_data.setdefault(entry.row.data, []).append(entry)
    blocks = []
    for group in by_data.values():
        metric = next((column for column in main if any(entry.stat(column) for entry in group)), None)
        scored = [entry for entry in group if metric is not None and entry.stat(metric)]
        if metric is not None and scored:
            blocks.append(_block(table, scored, metric, len(by_data)))
    return blocks


def _block(table: Table, entries: list[Entry], main: Column, n_blocks: int) -> Block:
    """Return the block of the entries on one data set, with colours and chosen entries."""
    all_methods = dict.fromkeys(entry.method for entry in entries)
    if len(all_methods) > 1:
        methods = {method: i for i, method in enumerate(list(all_methods)[:SERIES])}
        entries = [replace(entry, series=methods.get(entry.method)) for entry in entries]
        chosen = [min((e for e in entries if e.method == m), key=lambda e: e.order) for m in methods]
    else:
        methods = dict.fromkeys(all_methods, 0)
        best = sorted(sorted(entries, key=lambda entry: entry.order)[:SERIES], key=lambda entry: entry.number)
        series = {entry.number: i for i, entry in enumerate(best)}
        entries = [replace(entry, series=series.get(entry.number)) for entry in entries]
        chosen = [entry for entry in entries if entry.series is not None]
    costs = [c for c in table.columns if c.format not in ("key", "metric") and any(e.stat(c) for e in entries)]
    chosen.sort(key=lambda entry: entry.number)
    return Block(_data_name(table, entries) if n_blocks > 1 else "", entries, main, costs, chosen, methods)


def _entry(table: Table, number: int, row: Row, distinguishing: Sequence[Column]) -> Entry:
    """Return a row with its name: method, then the settings that distinguish it."""
    tails = Counter(column.name.rsplit(".", 1)[-1] for column in table.keys)
    method = " ".join(
        format_cell(row, column) for column in table.keys if _is_choice(column) and column.name in row.keys
    )
    settings = []
    for column in distinguishing:
        tail = column.name.rsplit(".", 1)[-1]
        settings.append(f"{to_single_line(tail if tails[tail] == 1 else column.name)}={format_cell(row, column)}")
    runs = sorted(((folder, table.records[folder]) for folder in row.folders), key=lambda run: _seed(run[1]))
    name = " ".join([method, *settings] if method else settings)
    return Entry(number, row, name or f"row {number + 1}", method, runs)


def _is_choice(column: Column) -> bool:
    """Return whether a column is a configuration group (`adapter`) and not a setting (`adapter.rank`)."""
    return "." not in column.name


def _distinguishing_settings(table: Table) -> list[list[Column]]:
    """Return for each row the settings that distinguish it from rows with the same choices.

    A method's only row needs none.
    """
    columns_by_row: list[list[Column]] = [[] for _ in table.rows]

    def distinguish(row_numbers: list[int], columns: Sequence[Column]) -> None:
        if len(row_numbers) == 1 or not columns:
            return
        column, *remaining = columns
        by_value: dict[str | None, list[int]] = {}
        for number in row_numbers:
            row = table.rows[number]
            by_value.setdefault(format_cell(row, column) if column.name in row.keys else None, []).append(number)
        for value, rows in by_value.items():
            if len(by_value) > 1 and value is not None:
                for number in rows:
                    columns_by_row[number].append(column)
            distinguish(rows, remaining)

    choices_first = sorted(table.keys, key=lambda column: not _is_choice(column))
    distinguish(list(range(len(table.rows))), choices_first)
    return [[column for column in columns if not _is_choice(column)] for columns in columns_by_row]


def _data_name(table: Table, entries: Sequence[Entry]) -> str:
    """Return the name of the data of some entries: their key columns of group `data`."""
    keys = [column for column in table.keys if column.name.split(".")[0] == "data"]
    return ", ".join(
        f"{to_single_line(c.name)}={format_cell(entries[0].row, c)}" for c in keys if c.name in entries[0].row.keys
    )


def _seed(record: dict[str, Any]) -> tuple[bool, int | str]:
    """Return the sort key of a record's seed."""
    seed = record["config"].get("seed")
    return (True, seed) if isinstance(seed, int) else (False, str(seed))
