"""Sections for a reviewer: how configurations differ, where runs were made, and what is not in the table."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from lora_bench.analysis.table import format_cell, format_value, visible_columns
from lora_bench.config.keys import flatten
from lora_bench.report.html import Content, Markup, element, join, pluralise, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_bench.analysis.table import Table

LISTED = 200
"""Runs that are listed one by one."""
VALUES = 12
"""Values of a key that are written out."""


def differences(table_: Table) -> Markup | None:
    """Return the configuration keys in which finished runs differ, with their values; shared keys are folded away."""
    runs = [table_.records[folder] for row in table_.rows for folder in row.folders]
    if not runs:
        return None
    configs = [{**record["choices"], **dict(flatten(record["config"]))} for record in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    counts = {key: Counter(format_value(config[key]) for config in configs if key in config) for key in keys}
    differ = [key for key in keys if len(counts[key]) > 1 or sum(counts[key].values()) < len(configs)]
    rows: list[list[Content]] = [[key, _values(counts[key], len(configs))] for key in differ]
    varying_table = (
        table("Keys that differ between runs", ["key", "values (runs)"], rows)
        if rows
        else element("p", "No key differs.")
    )
    shared_rows: list[list[Content]] = [[key, next(iter(counts[key]))] for key in keys if key not in differ]
    shared_table = table("Keys that all runs share", ["key", "value"], shared_rows)
    return join(
        [
            varying_table,
            element("details", element("summary", f"{len(shared_rows)} keys that all runs share"), shared_table),
        ]
    )


def _values(counts: Counter[str], runs: int) -> Markup:
    """Return the values of a key with the number of runs that have each, most common first."""
    most_common = counts.most_common(VALUES)
    items: list[Content] = [join([element("code", value), f" ({n})"]) for value, n in most_common]
    if len(counts) > VALUES:
        items.append(f"and {len(counts) - VALUES} more values")
    absent = runs - sum(counts.values())
    return join([*items, *([f"absent ({absent})"] if absent else [])], ", ")


def environment(table_: Table) -> Markup | None:
    """Return commit, device, versions and data of the finished runs, with the number of runs that have each value."""
    runs = [table_.records[folder] for row in table_.rows for folder in row.folders]
    if not runs:
        return None
    counts: dict[str, Counter[str]] = {}
    for record in runs:
        data = {key: record["data"].get(key) for key in ("source", "fingerprint", "rows")}
        for key, value in flatten({**record["environment"], "data": data}):
            counts.setdefault(key, Counter())[format_value(value)] += 1
    rows: list[list[Content]] = [[key, _values(value_counts, len(runs))] for key, value_counts in counts.items()]
    settings_table = table("Environment and data", ["key", "value (runs)"], rows)
    mixed = [key for key, value_counts in counts.items() if len(value_counts) > 1 and not key.startswith("data.")]
    times_differ = "device" in mixed or "threads" in mixed or "cpu" in mixed
    note = f"Runs differ in {', '.join(mixed)}." if mixed else "All runs were made in the same environment."
    note += " Their times are not comparable." if times_differ else ""
    return join([element("p", note, class_="note"), settings_table])


def missing(table_: Table) -> Markup | None:
    """Return the caveats, the runs that failed, diverged or are not done, and the folders that cannot be read."""
    sections = []
    if table_.notes:
        sections.append(element("ul", *(element("li", note) for note in table_.notes)))
    if table_.missing:
        rows: list[list[Content]] = [
            [element("code", str(m.folder)), m.status, element("code", m.overrides) if m.overrides else "", m.reason]
            for m in table_.missing[:LISTED]
        ]
        status_counts = ", ".join(
            f"{n} {status}" for status, n in Counter(m.status for m in table_.missing).most_common()
        )
        limit_note = f" The first {LISTED} are listed." if len(table_.missing) > LISTED else ""
        sections.append(element("p", f"Not in the table: {status_counts}.{limit_note}"))
        sections.append(table("Not in the table", ["folder", "status", "overrides", "reason"], rows))
    return join(sections) if sections else None


def side_table(other: Table | None, caption: str) -> Markup | None:
    """Return a side table of `compare`; None if there is none."""
    if other is None or not other.rows:
        return None
    columns = visible_columns(other)
    rows: list[list[Content]] = [[format_cell(row, column) for column in columns] for row in other.rows]
    return table(caption, [column.header for column in columns], rows)


def folders(table_: Table) -> Markup | None:
    """Return the run folders of each row, folded away."""
    keys = table_.keys
    rows: Iterable[list[Content]] = (
        [
            ", ".join(format_cell(row, key) for key in keys) or str(i + 1),
            join([element("code", str(f)) for f in row.folders[:20]], " "),
        ]
        for i, row in enumerate(table_.rows[:LISTED])
    )
    folder_table = table("Run folders", ["experiment", "folders"], rows)
    runs = sum(len(row.folders) for row in table_.rows)
    return (
        element("details", element("summary", f"Folders of the {pluralise(runs, 'run')}"), folder_table)
        if table_.rows
        else None
    )


def description(table_: Table) -> str:
    """Return the number of experiments, runs and seeds that were compared, in one line."""
    runs = sum(row.n for row in table_.rows)
    seeds = {json.dumps(table_.records[f]["config"].get("seed")) for row in table_.rows for f in row.folders}
    counts = f"{pluralise(len(table_.rows), 'experiment')}, {pluralise(runs, 'run')}, {pluralise(len(seeds), 'seed')}"
    return counts + (f"; {pluralise(len(table_.missing), 'run')} not in the table" if table_.missing else "")
