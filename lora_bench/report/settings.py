"""All settings: a table to sort, filter and tick, and the data of the charts that compare what is ticked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.analysis.table import Column, format_cell, visible_columns
from lora_bench.config.recorded_task import main_metric
from lora_bench.console.format import to_single_line
from lora_bench.report import specs
from lora_bench.report.blocks import bounds, column_name, finite
from lora_bench.report.content import Widget
from lora_bench.report.curves import mean_curve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.analysis.table import Table
    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Content

LISTED = 1000
"""Settings that are listed."""
CURVES = 60
"""Settings whose learning curves can be compared."""

COST_NAMES = {
    "params.adapter": "adapter parameters",
    "params.head": "head parameters",
    "params.total": "all parameters",
    "cost.train_seconds": "training time (s)",
    "cost.train_flops": "training FLOPs",
    "cost.peak_memory_bytes": "peak memory (B)",
    "adapter_bytes": "size on disk (B)",
    "steps_to_target": "steps to the target",
    "flops_to_target": "FLOPs to the target",
    "seconds_to_target": "seconds to the target (s)",
}
"""Names of costs on axes, with their unit."""


def settings(table: Table, blocks: Sequence[Block]) -> list[Content]:
    """Return the section with all settings of all data sets; empty if there are none."""
    entries = sorted((entry for block in blocks for entry in block.entries), key=lambda entry: entry.number)[:LISTED]
    if not entries:
        return []
    columns = visible_columns(table)
    rows = [
        {"entry": entry, "role": role(entry), "cells": [format_cell(entry.row, column) for column in columns]}
        for entry in entries
    ]
    n_all = sum(len(block.entries) for block in blocks)
    data = settings_data(table, blocks, entries)
    return [
        Widget(
            "settings.html",
            {
                "columns": columns,
                "rows": rows,
                "all": n_all,
                "data": data,
                "metrics": [
                    (i, column["title"], column["name"] == blocks[0].main.name)
                    for i, column in enumerate(data["columns"])
                    if column["metric"]
                ],
                "intervals": specs.interval_chart([], [], data["lines"], ""),
                "curves": curves_template(),
            },
        )
    ]


def role(entry: Entry) -> str:
    """Return the part that a setting has in the comparison; empty if it has none."""
    if entry.row.recommended:
        return "recommended"
    return "baseline" if entry.is_baseline else "chosen" if entry.row.chosen else ""


def settings_data(table: Table, blocks: Sequence[Block], entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the numbers of settings for the page's script: columns, and rows with means, intervals and curves.

    `values`, `low` and `high` of a row are in the order of `columns`. A curve is a list of steps and means on the
    selection split.
    """
    columns = numeric_columns(table, entries)
    block_of = {entry.number: i for i, block in enumerate(blocks) for entry in block.entries}
    labels, lines = specs.labels(
        [entry.name for entry in entries], [[entry.method, entry.settings] for entry in entries]
    )
    first = sorted(entries, key=lambda entry: (not entry.row.chosen, entry.number))[:CURVES]
    curves = {entry.number: mean_curve(entry, blocks[block_of[entry.number]].metric) for entry in first}
    rows = []
    for entry in entries:
        block = blocks[block_of[entry.number]]
        stats = [_values(entry, column) for column in columns]
        rows.append(
            {
                "name": entry.name,
                "label": labels[entry.name],
                "legend": specs.legend_name(entry.name),
                "series": block.series_name(entry) or specs.OTHERS,
                "block": block_of[entry.number],
                "recommended": entry.row.recommended,
                "values": [value for value, _, _ in stats],
                "low": [low for _, low, _ in stats],
                "high": [high for _, _, high in stats],
                "curve": curves.get(entry.number) or None,
            }
        )
    described = [
        {"name": column.name, "title": axis_title(column), "metric": column.format == "metric"} for column in columns
    ]
    return {"columns": described, "rows": rows, "lines": lines, "lane_height": specs.lane_height(lines)}


def numeric_columns(table: Table, entries: Sequence[Entry]) -> list[Column]:
    """Return the columns that can be an axis: metrics, costs, and keys with numbers."""
    metrics = [column for column in table.columns if column.format == "metric"]
    costs = [column for column in table.columns if column.format not in ("key", "metric", "interval", "text")]
    selection = dict.fromkeys(f"selection/{main_metric(entry.runs[0][1])}" for entry in entries)
    metrics += [Column(name, "metric", "↑") for name in selection if all(column.name != name for column in metrics)]
    columns = [*metrics, *table.keys, *costs]
    return [column for column in columns if any(_values(entry, column)[0] is not None for entry in entries)]


def _values(entry: Entry, column: Column) -> tuple[float | None, float | None, float | None]:
    """Return the mean of a column and its interval; for a key its value."""
    if column.format == "key":
        value = entry.row.keys.get(column.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (finite(float(value)) if is_number and value is not None else None), None, None
    stat = entry.stat(column)
    if stat is None:
        is_selection = column.name == f"selection/{main_metric(entry.runs[0][1])}"
        return (finite(entry.selection_score) if is_selection else None), None, None
    low, high = bounds(stat) if column.format == "metric" else (None, None)
    return _short(stat.mean), _short(low), _short(high)


def _short(value: float | None) -> float | None:
    """Return a number with ten digits, which keep the page small."""
    return None if finite(value) is None else float(f"{value:.10g}")


def axis_title(column: Column) -> str:
    """Return the title of an axis that shows a column."""
    if column.format == "metric":
        return column_name(column)
    return COST_NAMES.get(column.name, to_single_line(column.name))


def curves_template() -> specs.Spec:
    """Return the chart of learning curves of ticked settings, without data."""
    x = specs.quantity("step", "step", axis={"format": "~s"})
    y = specs.quantity("value", "selection score")
    colour = specs.series_channels([])["color"] | {"legend": {"title": None}}
    line = {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": x, "y": y, "color": colour}}
    points = {
        "mark": {"type": "point", "filled": True, "opacity": 1, "size": 40},
        "encoding": {"x": x, "y": y, "color": colour, "tooltip": specs.TIP},
    }
    return specs.chart([], [line, points], height=260)
