"""Sections for a reviewer: how configurations differ, where runs were made, and what is not in the table."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.table import format_cell, format_value, visible_columns
from lora_bench.config.keys import flatten
from lora_bench.report.content import Bullets, Code, DataTable, Fold, Paragraph, pluralise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.analysis.table import Table
    from lora_bench.report.blocks import Block
    from lora_bench.report.content import Cell, Content

LISTED = 200
"""Runs or settings that are listed one by one."""
VALUES = 12
"""Values of a key that are written out."""


def differences(table: Table) -> list[Content]:
    """Return the configuration keys in which finished runs differ, with their values; shared keys are folded away."""
    runs = _finished(table)
    if not runs:
        return []
    configs = [{**record["choices"], **dict(flatten(record["config"]))} for record in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    counts = {key: Counter(format_value(config[key]) for config in configs if key in config) for key in keys}
    differ = [key for key in keys if len(counts[key]) > 1 or sum(counts[key].values()) < len(configs)]
    rows: list[list[Cell]] = [[Code(key), _values(counts[key], len(configs))] for key in differ]
    varying = DataTable("Keys that differ between runs", ["key", "values (runs)"], rows, style="prose")
    shared: list[list[Cell]] = [[Code(key), Code(next(iter(counts[key])))] for key in keys if key not in differ]
    shared_table = DataTable("Keys that all runs share", ["key", "value"], shared, style="prose")
    contents: list[Content] = [varying if rows else Paragraph("No key differs.")]
    return [*contents, Fold(f"{len(shared)} keys that all runs share", [shared_table])]


def _finished(table: Table) -> list[dict[str, Any]]:
    """Return the records of the runs of all settings."""
    return [table.records[folder] for row in table.settings or table.rows for folder in row.folders]


def _values(counts: Counter[str], runs: int) -> Cell:
    """Return the values of a key with the number of runs that have each, most common first."""
    most_common = counts.most_common(VALUES)
    items: list[Cell] = [(Code(value), f"({n})") for value, n in most_common]
    if len(counts) > VALUES:
        items.append(f"and {len(counts) - VALUES} more values")
    absent = runs - sum(counts.values())
    return (*items, *([f"absent ({absent})"] if absent else []))


def environment(table: Table) -> list[Content]:
    """Return commit, device, versions and data of the finished runs, with the number of runs that have each value."""
    runs = _finished(table)
    if not runs:
        return []
    counts: dict[str, Counter[str]] = {}
    for record in runs:
        data = {key: record["data"].get(key) for key in ("source", "fingerprint", "rows")}
        for key, value in flatten({**record["environment"], "data": data}):
            counts.setdefault(key, Counter())[format_value(value)] += 1
    rows: list[list[Cell]] = [[Code(key), _values(value_counts, len(runs))] for key, value_counts in counts.items()]
    mixed = [key for key, value_counts in counts.items() if len(value_counts) > 1 and not key.startswith("data.")]
    times_differ = "device" in mixed or "threads" in mixed or "cpu" in mixed
    note = f"Runs differ in {', '.join(mixed)}." if mixed else "All runs were made in the same environment."
    note += " Their times are not comparable." if times_differ else ""
    return [Paragraph(note), DataTable("Environment and data", ["key", "value (runs)"], rows, style="prose")]


def missing(table: Table) -> list[Content]:
    """Return the caveats, the runs that failed, diverged or are not done, and the folders that cannot be read."""
    contents: list[Content] = [Bullets(table.notes)] if table.notes else []
    if table.missing:
        rows: list[list[Cell]] = [
            [Code(str(m.folder)), m.status, Code(m.overrides), m.reason] for m in table.missing[:LISTED]
        ]
        limit_note = f" The first {LISTED} are listed." if len(table.missing) > LISTED else ""
        contents.append(Paragraph(f"Not in the table: {status_counts(table)}.{limit_note}"))
        header = ["folder", "status", "overrides", "reason"]
        contents.append(DataTable("Not in the table", header, rows, style="prose"))
    return contents


def status_counts(table: Table) -> str:
    """Return the number of missing runs by status: `2 failed, 1 running`."""
    return ", ".join(f"{n} {status}" for status, n in Counter(m.status for m in table.missing).most_common())


def side_table(other: Table | None, caption: str) -> list[Content]:
    """Return a side table of `compare`; empty if there is none."""
    if other is None or not other.rows:
        return []
    columns = visible_columns(other)
    rows: list[list[Cell]] = [[format_cell(row, column) for column in columns] for row in other.rows]
    return [DataTable(caption, [column.header for column in columns], rows)]


def folders(blocks: Sequence[Block]) -> list[Content]:
    """Return the run folders of each setting."""
    entries = [entry for block in blocks for entry in block.entries]
    rows: list[list[Cell]] = [
        [entry.name, tuple(Code(str(folder)) for folder, _ in entry.runs[:20])] for entry in entries[:LISTED]
    ]
    if not rows:
        return []
    note = f"The first {LISTED} of {len(entries):,} settings are listed."
    table = DataTable("Run folders", ["setting", "folders"], rows, style="prose")
    return [*([Paragraph(note)] if len(entries) > LISTED else []), table]


def description(table: Table) -> str:
    """Return the number of settings, runs and seeds that were compared, in one line."""
    settings = table.settings or table.rows
    seeds = {json.dumps(record["config"].get("seed")) for record in _finished(table)}
    n_methods = len({row.method for row in settings})
    counts = [pluralise(n_methods, "method"), pluralise(len(settings), "setting")]
    counts += [pluralise(sum(row.n for row in settings), "run"), pluralise(len(seeds), "seed")]
    text = ", ".join(counts)
    return text + (f"; not in the table: {status_counts(table)}" if table.missing else "")
