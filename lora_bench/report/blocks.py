"""Entries and blocks: the settings of the table with names and colours, grouped by the data that they share."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.decision import block_label
from lora_bench.analysis.settings import TUNED_KEYS, mean_selection_score
from lora_bench.analysis.table import format_cell, format_value
from lora_bench.config.metric_names import display_name
from lora_bench.config.recorded_task import label_names, main_metric, recorded_form
from lora_bench.console.format import format_number, to_single_line
from lora_bench.report.specs import SERIES, legend_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lora_bench.analysis.decision import Decision
    from lora_bench.analysis.table import Column, Row, Stat, Table


@dataclass(frozen=True)
class Entry:
    """A setting of the table."""

    number: int
    """Number among all settings, from 0."""
    row: Row
    method: str
    """Name of its method, unique among the methods."""
    settings: str
    """The hyperparameters that distinguish it from other settings of its method; empty if there are none."""
    runs: list[tuple[Path, dict[str, Any]]]
    """Folder and record of each run, by seed."""
    series: int | None = None
    """Number of its colour and shape; None for an entry without them."""

    @property
    def name(self) -> str:
        """Method and settings, unique on the page."""
        return " ".join(filter(None, (self.method, self.settings)))

    def stat(self, column: Column) -> Stat | None:
        """Return mean and spread of a column; None if the row has none."""
        return self.row.stats.get(column.name)

    @property
    def selection_score(self) -> float:
        """Mean main metric on the selection split, which chooses between settings; -inf if a run has none."""
        return mean_selection_score([record for _, record in self.runs])

    @property
    def is_baseline(self) -> bool:
        """True if the others are tested against it."""
        return self.row.is_baseline


@dataclass(frozen=True)
class Block:
    """The settings on one data set."""

    name: str
    """Name of the data; empty if there is only one data set."""
    decision: Decision | None
    """The setting to use on this data."""
    rows: list[Entry]
    """The rows that `compare` prints, in its order."""
    entries: list[Entry]
    """All settings."""
    main: Column
    """The metric that was tested."""
    chosen: list[Entry]
    """At most `SERIES` entries with a colour: the setting of each method, or the best settings of a single method."""
    series: list[str]
    """Names of the colours: methods, or the settings of a single method."""

    @property
    def baseline(self) -> Entry | None:
        """The entry that the others are tested against."""
        return next((entry for entry in self.rows if entry.is_baseline), None)

    @property
    def split(self) -> str:
        """The reported split of the main metric."""
        if "/" in self.main.name:
            return self.main.name.split("/")[0]
        metrics = self.entries[0].runs[0][1]["metrics"]
        return next((split for split in ("validation", "test") if f"{split}/{self.main.name}" in metrics), "validation")

    @property
    def metric(self) -> str:
        """The tested metric without its split: `mcc`."""
        return self.main.name.rsplit("/", 1)[-1]

    @property
    def main_metric(self) -> str:
        """The metric that chooses between settings on the selection split."""
        return main_metric(self.entries[0].runs[0][1])

    @property
    def form(self) -> str:
        """The form of the task: `binary`, `multiclass` or `regression`."""
        return recorded_form(self.entries[0].runs[0][1])

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes; None where they are not recorded."""
        return label_names(self.entries[0].runs[0][1])

    @property
    def n_methods(self) -> int:
        """Number of methods."""
        return len({entry.row.method for entry in self.entries})

    def series_name(self, entry: Entry) -> str | None:
        """Return the name of an entry's colour; None if it has none."""
        return None if entry.series is None else self.series[entry.series]

    @property
    def chosen_note(self) -> str:
        """A sentence about `chosen`; empty if all entries are chosen."""
        if len(self.chosen) == len(self.entries):
            return ""
        if self.n_methods == 1:
            return f"The {len(self.chosen)} best settings on the selection split, of {len(self.entries)}."
        return f"Each method at its chosen setting, of {len(self.entries)} settings."


def group_blocks(table: Table) -> list[Block]:
    """Return the table's settings in blocks of comparable ones; a data set without the metric is left out.

    Args:
        table: as `summarise` returns it.
    """
    settings = table.settings or table.rows
    entries = _name_entries(table, settings)
    number_by_folders = {tuple(row.folders): i for i, row in enumerate(settings)}
    visible = {}
    for row in table.rows:
        number = number_by_folders[tuple(row.folders)]
        visible[number] = entries[number] = replace(entries[number], row=row)
    by_data: dict[str | None, list[Entry]] = {}
    for entry in entries:
        by_data.setdefault(entry.row.data, []).append(entry)
    decisions = {decision.data: decision for decision in table.decisions}
    blocks = []
    for data in dict.fromkeys([*(row.data for row in table.rows), *by_data]):
        group = by_data[data]
        main = _main_column(table, group)
        if main is not None:
            rows = [number for number in visible if entries[number].row.data == data]
            blocks.append(_block(table, group, rows, main, decisions.get(data), len(by_data) > 1))
    return blocks


def _main_column(table: Table, entries: Sequence[Entry]) -> Column | None:
    """Return the column of the tested metric, else of the first metric that an entry has."""
    measure = entries[0].row.measure
    metrics = [column for column in table.columns if column.format == "metric"]
    metrics.sort(key=lambda column: column.name.rsplit("/", 1)[-1] != measure)
    return next((column for column in metrics if any(entry.stat(column) for entry in entries)), None)


def _block(
    table: Table,
    entries: list[Entry],
    row_numbers: Sequence[int],
    main: Column,
    decision: Decision | None,
    several: bool,
) -> Block:
    """Return the block of the entries on one data set, with colours."""
    numbers = [*row_numbers, *(entry.number for entry in entries if entry.number not in row_numbers)]
    by_number = {entry.number: entry for entry in entries}
    ordered = [by_number[number] for number in numbers]
    methods = list(dict.fromkeys(entry.method for entry in ordered))
    if len(methods) > 1:
        series = methods[:SERIES]
        colour = {number: i for i, name in enumerate(series) for number in numbers if by_number[number].method == name}
        chosen = [_representative([e for e in ordered if e.method == name]).number for name in series]
    else:
        best = sorted(ordered, key=lambda entry: (-entry.selection_score, entry.number))[:SERIES]
        chosen = [number for number in numbers if number in {entry.number for entry in best}]
        series = [by_number[number].name for number in chosen]
        colour = {number: i for i, number in enumerate(chosen)}
    by_number = {number: replace(entry, series=colour.get(number)) for number, entry in by_number.items()}
    return Block(
        name=block_label(table, entries[0].row) if several else "",
        decision=decision,
        rows=[by_number[number] for number in row_numbers],
        entries=[by_number[entry.number] for entry in entries],
        main=main,
        chosen=[by_number[number] for number in chosen],
        series=[legend_name(name) for name in series],
    )


def _representative(entries: Sequence[Entry]) -> Entry:
    """Return a method's chosen setting; if none is chosen, its first one."""
    return next((entry for entry in entries if entry.row.chosen), entries[0])


# -- names --


def _name_entries(table: Table, settings: Sequence[Row]) -> list[Entry]:
    """Return an entry for each setting, with unique names."""
    short = _short_keys(table)
    by_method: dict[int, list[int]] = {}
    for i, row in enumerate(settings):
        by_method.setdefault(row.method, []).append(i)
    names = _method_names(table, [[settings[i] for i in numbers] for numbers in by_method.values()], short)
    entries: dict[int, Entry] = {}
    taken: Counter[str] = Counter()
    for method, numbers in zip(names, by_method.values(), strict=True):
        varying = [key for key in table.keys if len({_value(settings[i], key) for i in numbers}) > 1]
        for i in numbers:
            row = settings[i]
            text = " ".join(f"{short[key.name]}={_value(row, key)}" for key in varying if key.name in row.keys)
            taken[f"{method} {text}"] += 1
            if taken[f"{method} {text}"] > 1:
                text = f"{text} ({taken[f'{method} {text}']})".strip()
            runs = sorted(((folder, table.records[folder]) for folder in row.folders), key=lambda run: _seed(run[1]))
            entries[i] = Entry(i, row, method, text, runs)
    return [entries[i] for i in range(len(settings))]


def _method_names(table: Table, methods: Sequence[Sequence[Row]], short: dict[str, str]) -> list[str]:
    """Return a unique name for each method: the values of its choices, then other keys in which methods differ."""
    shared = [
        [key for key in table.keys if key.name in rows[0].keys and len({_value(row, key) for row in rows}) == 1]
        for rows in methods
    ]

    def name(rows: Sequence[Row], keys: Sequence[Column]) -> str:
        return " ".join(
            _value(rows[0], key) if "." not in key.name else f"{short[key.name]}={_value(rows[0], key)}" for key in keys
        )

    untuned = [
        name(rows, [key for key in keys if key.name not in TUNED_KEYS])
        for rows, keys in zip(methods, shared, strict=True)
    ]
    counts = Counter(untuned)
    names: list[str] = []
    for rows, keys, text in zip(methods, shared, untuned, strict=True):
        text = name(rows, keys) if counts[text] > 1 or not text else text
        text = text or " ".join(str(table.records[rows[0].folders[0]]["choices"].get("adapter") or "runs").split())
        text = to_single_line(text)
        names.append(text if text not in names else f"{text} ({len(names) + 1})")
    return names


def _short_keys(table: Table) -> dict[str, str]:
    """Return the last word of each key, or the whole key if two of them end alike."""
    tails = {key.name: key.name.rsplit(".", 1)[-1] for key in table.keys}
    counts = Counter(tails.values())
    return {name: to_single_line(tail if counts[tail] == 1 else name) for name, tail in tails.items()}


def _value(row: Row, key: Column) -> str:
    """Return the text of a key's value; empty if the row does not have the key."""
    return format_value(row.keys[key.name]) if key.name in row.keys else ""


def _seed(record: dict[str, Any]) -> tuple[bool, int | str]:
    """Return the sort key of a record's seed."""
    seed = record["config"].get("seed")
    return (True, seed) if isinstance(seed, int) else (False, str(seed))


# -- numbers --


def bounds(stat: Stat) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of a mean over seeds; None for one seed."""
    return stat.interval or (None, None)


def column_name(column: Column) -> str:
    """Return the name of a metric's column as papers spell it."""
    tail = column.name.rsplit("/", 1)[-1]
    return to_single_line(column.name.removesuffix(tail) + display_name(tail))


def cost_formatter(column: Column) -> Callable[[float], str]:
    """Return a function that formats a value of a cost column as the table does."""
    from lora_bench.analysis.table import Row, Stat

    def format_cost(value: float) -> str:
        if value == 0:
            return "0"
        return format_cell(Row({}, {column.name: Stat(value, None, 1)}, 1, []), column)

    return format_cost if column.format != "count" else lambda value: format_number(value)


def finite(value: float | None) -> float | None:
    """Return a number for JSON: None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None
