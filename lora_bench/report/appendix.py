"""What a reviewer checks: how configurations differ, where runs were made, and what is not in the table."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from lora_bench.analysis.table import cell, value_text, visible
from lora_bench.config.keys import flatten
from lora_bench.report.html import Content, Markup, el, join, several, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_bench.analysis.table import Table

LISTED = 200
"""Runs that are listed one by one."""
VALUES = 12
"""Different values of a key that are written out."""


def differences(table_: Table) -> Markup | None:
    """Every config key in which finished runs differ, with its values; what all share is folded away."""
    runs = [table_.records[folder] for row in table_.rows for folder in row.folders]
    if not runs:
        return None
    configs = [{**record["choices"], **dict(flatten(record["config"]))} for record in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    counts = {key: Counter(value_text(config[key]) for config in configs if key in config) for key in keys}
    differ = [key for key in keys if len(counts[key]) > 1 or sum(counts[key].values()) < len(configs)]
    rows: list[list[Content]] = [[key, _values(counts[key], len(configs))] for key in differ]
    made = (
        table("Keys that differ between runs", ["key", "values (runs)"], rows) if rows else el("p", "No key differs.")
    )
    shared: list[list[Content]] = [[key, next(iter(counts[key]))] for key in keys if key not in differ]
    common = table("Keys that all runs share", ["key", "value"], shared)
    return join([made, el("details", el("summary", f"{len(shared)} keys that all runs share"), common)])


def _values(counts: Counter[str], runs: int) -> Markup:
    shown = counts.most_common(VALUES)
    parts: list[Content] = [join([el("code", value), f" ({n})"]) for value, n in shown]
    if len(counts) > VALUES:
        parts.append(f"and {len(counts) - VALUES} more values")
    absent = runs - sum(counts.values())
    return join([*parts, *([f"absent ({absent})"] if absent else [])], ", ")


def environment(table_: Table) -> Markup | None:
    """Commit, device, versions and data of the finished runs; where they differ, how many runs have which."""
    runs = [table_.records[folder] for row in table_.rows for folder in row.folders]
    if not runs:
        return None
    counts: dict[str, Counter[str]] = {}
    for record in runs:
        data = {key: record["data"].get(key) for key in ("source", "fingerprint", "rows")}
        for key, value in flatten({**record["environment"], "data": data}):
            counts.setdefault(key, Counter())[value_text(value)] += 1
    rows: list[list[Content]] = [[key, _values(found, len(runs))] for key, found in counts.items()]
    made = table("Environment and data", ["key", "value (runs)"], rows)
    mixed = [key for key, found in counts.items() if len(found) > 1 and not key.startswith("data.")]
    times = "device" in mixed or "threads" in mixed or "cpu" in mixed
    note = f"Runs differ in {', '.join(mixed)}." if mixed else "All runs were made in the same environment."
    note += " Their times are not comparable." if times else ""
    return join([el("p", note, class_="note"), made])


def missing(table_: Table) -> Markup | None:
    """Runs that failed, diverged or are not done, folders that cannot be read, and caveats."""
    parts = []
    if table_.notes:
        parts.append(el("ul", *(el("li", note) for note in table_.notes)))
    if table_.missing:
        rows: list[list[Content]] = [
            [el("code", str(m.folder)), m.status, el("code", m.asked) if m.asked else "", m.reason]
            for m in table_.missing[:LISTED]
        ]
        counted = ", ".join(f"{n} {status}" for status, n in Counter(m.status for m in table_.missing).most_common())
        more = f" The first {LISTED} are listed." if len(table_.missing) > LISTED else ""
        parts.append(el("p", f"Not in the table: {counted}.{more}"))
        parts.append(table("Not in the table", ["folder", "status", "asked for", "why"], rows))
    return join(parts) if parts else None


def beside(other: Table | None, caption: str) -> Markup | None:
    """A table that `compare` prints below its own, as it is."""
    if other is None or not other.rows:
        return None
    columns = visible(other)
    rows: list[list[Content]] = [[cell(row, column) for column in columns] for row in other.rows]
    return table(caption, [column.header for column in columns], rows)


def folders(table_: Table) -> Markup | None:
    """Where each row's runs lie."""
    keys = table_.keys
    rows: Iterable[list[Content]] = (
        [
            ", ".join(cell(row, key) for key in keys) or str(i + 1),
            join([el("code", str(f)) for f in row.folders[:20]], " "),
        ]
        for i, row in enumerate(table_.rows[:LISTED])
    )
    made = table("Run folders", ["experiment", "folders"], rows)
    runs = sum(len(row.folders) for row in table_.rows)
    return el("details", el("summary", f"Folders of the {several(runs, 'run')}"), made) if table_.rows else None


def description(table_: Table) -> str:
    """How much was compared, in one line."""
    runs = sum(row.n for row in table_.rows)
    seeds = {json.dumps(table_.records[f]["config"].get("seed")) for row in table_.rows for f in row.folders}
    told = f"{several(len(table_.rows), 'experiment')}, {several(runs, 'run')}, {several(len(seeds), 'seed')}"
    return told + (f"; {several(len(table_.missing), 'run')} not in the table" if table_.missing else "")
