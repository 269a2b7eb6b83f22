"""Who plays which part: the rows of the table by name and colour, in blocks that are comparable."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.significance import BASELINE
from lora_bench.analysis.table import cell
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
    """Its place in the table, from 0: what ties a point of a chart to its row."""
    row: Row
    name: str
    method: str
    """Its choices alone (`lora`, `bert lora`): what rows that differ in numbers share."""
    runs: list[tuple[Path, dict[str, Any]]]
    """Folder and record of each run, by seed."""
    series: int | None = None
    """Colour and shape; None for the crowd."""

    def stat(self, column: Column) -> Stat | None:
        return self.row.stats.get(column.name)

    @property
    def selected_by(self) -> float:
        """Mean MCC on the selection split, by which one row of several is chosen; -inf where there is none."""
        found = [record["metrics"].get("selection/mcc") for _, record in self.runs]
        numbers = [value for value in found if isinstance(value, int | float)]
        return statistics.fmean(numbers) if numbers else -math.inf

    @property
    def order(self) -> tuple[float, int]:
        """Best on the selection split first; where there is none, as in the table."""
        return -self.selected_by, self.number


@dataclass(frozen=True)
class Block:
    """The rows on one data set, best first."""

    name: str
    """Of the data; empty where there is only one data set."""
    entries: list[Entry]
    main: Column
    """The metric that rows are ordered by."""
    costs: list[Column]
    chosen: list[Entry]
    """At most `SERIES`: the best of each method by the selection split, or the best rows of a single method."""
    methods: dict[str, int]
    """Methods with a colour."""

    @property
    def baseline(self) -> Entry | None:
        """What the others are tested against."""
        return next((e for e in self.entries if e.row.finding and e.row.finding.verdict == BASELINE), None)

    @property
    def judged(self) -> list[Entry]:
        """Those with a verdict, best first."""
        return [entry for entry in self.entries if entry.row.finding and entry.row.finding.p_holm is not None]

    @property
    def chosen_how(self) -> str:
        """A sentence about `chosen`, empty where all rows are among them."""
        if len(self.chosen) == len(self.entries):
            return ""
        what = "The best setting of each method" if len(self.methods) > 1 else f"The {len(self.chosen)} best settings"
        selected = all(math.isfinite(entry.selected_by) for entry in self.chosen)
        return f"{what}, by {'the selection split' if selected else self.main.name}, of {len(self.entries)}."


def blocks(table: Table) -> list[Block]:
    """The table's rows as blocks of comparable ones; a row without the main metric is left out."""
    main = [column for column in table.columns if column.kind == "metric" and column.name.endswith("mcc")]
    if not main:
        return []
    told = _telling(table)
    entries = [_entry(table, number, row, told[number]) for number, row in enumerate(table.rows)]
    by_data: dict[str | None, list[Entry]] = {}
    for entry in entries:
        by_data.setdefault(entry.row.data, []).append(entry)
    made = []
    for group in by_data.values():
        metric = next((column for column in main if any(entry.stat(column) for entry in group)), None)
        scored = [entry for entry in group if metric is not None and entry.stat(metric)]
        if metric is not None and scored:
            made.append(_block(table, scored, metric, len(by_data)))
    return made


def _block(table: Table, entries: list[Entry], main: Column, n_blocks: int) -> Block:
    counted = dict.fromkeys(entry.method for entry in entries)
    if len(counted) > 1:
        methods = {method: i for i, method in enumerate(list(counted)[:SERIES])}
        entries = [replace(entry, series=methods.get(entry.method)) for entry in entries]
        chosen = [min((e for e in entries if e.method == m), key=lambda e: e.order) for m in methods]
    else:
        methods = dict.fromkeys(counted, 0)
        best = sorted(sorted(entries, key=lambda entry: entry.order)[:SERIES], key=lambda entry: entry.number)
        series = {entry.number: i for i, entry in enumerate(best)}
        entries = [replace(entry, series=series.get(entry.number)) for entry in entries]
        chosen = [entry for entry in entries if entry.series is not None]
    costs = [c for c in table.columns if c.kind not in ("key", "metric") and any(e.stat(c) for e in entries)]
    chosen.sort(key=lambda entry: entry.number)
    return Block(_data_name(table, entries) if n_blocks > 1 else "", entries, main, costs, chosen, methods)


def _entry(table: Table, number: int, row: Row, telling: Sequence[Column]) -> Entry:
    tails = Counter(column.name.rsplit(".", 1)[-1] for column in table.keys)
    method = " ".join(cell(row, column) for column in table.keys if _is_choice(column) and column.name in row.keys)
    settings = []
    for column in telling:
        tail = column.name.rsplit(".", 1)[-1]
        settings.append(f"{to_single_line(tail if tails[tail] == 1 else column.name)}={cell(row, column)}")
    runs = sorted(((folder, table.records[folder]) for folder in row.folders), key=lambda run: _seed(run[1]))
    name = " ".join([method, *settings] if method else settings)
    return Entry(number, row, name or f"row {number + 1}", method, runs)


def _is_choice(column: Column) -> bool:
    """Of a group (`adapter`), which is always told, and not a setting (`adapter.rank`)."""
    return "." not in column.name


def _telling(table: Table) -> list[list[Column]]:
    """For each row, the settings that tell it from the others of its choices: at a method's only row none is needed."""
    told: list[list[Column]] = [[] for _ in table.rows]

    def tell_apart(alike: list[int], columns: Sequence[Column]) -> None:
        if len(alike) == 1 or not columns:
            return
        column, *others = columns
        by_value: dict[str | None, list[int]] = {}
        for number in alike:
            row = table.rows[number]
            by_value.setdefault(cell(row, column) if column.name in row.keys else None, []).append(number)
        for value, rows in by_value.items():
            if len(by_value) > 1 and value is not None:
                for number in rows:
                    told[number].append(column)
            tell_apart(rows, others)

    choices_first = sorted(table.keys, key=lambda column: not _is_choice(column))
    tell_apart(list(range(len(table.rows))), choices_first)
    return [[column for column in columns if not _is_choice(column)] for columns in told]


def _data_name(table: Table, entries: Sequence[Entry]) -> str:
    keys = [column for column in table.keys if column.name.split(".")[0] == "data"]
    return ", ".join(
        f"{to_single_line(c.name)}={cell(entries[0].row, c)}" for c in keys if c.name in entries[0].row.keys
    )


def _seed(record: dict[str, Any]) -> tuple[bool, int | str]:
    seed = record["config"].get("seed")
    return (True, seed) if isinstance(seed, int) else (False, str(seed))
