"""Quality against cost, with axes to choose and the Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.report import specs
from lora_bench.report.blocks import column_name, cost_formatter
from lora_bench.report.content import DataTable, Figure, Widget, pluralise
from lora_bench.report.settings import COST_NAMES, axis_title, numeric_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.analysis.table import Column, Table
    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

FIRST = ("cost.train_flops", "params.adapter", "cost.train_seconds")
"""Costs for the horizontal axis at first, the first one in which settings differ."""
LOG_FROM = 5
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def costs(table: Table, block: Block, number: int) -> list[Content]:
    """Return the chart of quality against cost; empty if no cost differs between settings.

    Args:
        table: as `summarise` returns it.
        block: of one data set.
        number: of the block among those of the page.
    """
    entries = [entry for entry in block.entries if entry.stat(block.main)]
    columns = numeric_columns(table, block.entries)
    horizontal = [column for column in columns if column.format != "metric" and _differs(entries, column)]
    ordered = sorted(horizontal, key=lambda c: FIRST.index(c.name) if c.name in FIRST else len(FIRST))
    drawn = next((column for column in ordered if column.name in COST_NAMES), None)
    if drawn is None:
        return []
    figure = _figure(block, entries, drawn)
    values = {
        "figure": figure,
        "block": number,
        "horizontal": [(column.name, axis_title(column), column is drawn) for column in horizontal],
        "vertical": [(c.name, axis_title(c), c.name == block.main.name) for c in columns if c.format == "metric"],
        "lower_is_better": [column.name for column in columns if column.arrow == "↓"],
    }
    return [Widget("tradeoffs.html", values)]


def _value(entry: Entry, column: Column) -> float | None:
    """Return an entry's number in a column."""
    if column.format != "key":
        stat = entry.stat(column)
        return None if stat is None else stat.mean
    value = entry.row.keys.get(column.name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _differs(entries: Sequence[Entry], column: Column) -> bool:
    """Return whether entries visibly differ in a cost."""
    values = [value for entry in entries if (value := _value(entry, column)) is not None]
    show = cost_formatter(column) if column.format != "key" else repr
    return len({show(value) for value in values}) > 1


def _figure(block: Block, entries: Sequence[Entry], column: Column) -> Figure:
    """Return the chart of the main metric against one cost."""
    points = [(entry, value) for entry in entries if (value := _value(entry, column)) is not None]
    quality = [entry.row.stats[block.main.name].mean for entry, _ in points]
    front = pareto([(cost, value) for (_, cost), value in zip(points, quality, strict=True)])
    show = cost_formatter(column)
    values: list[dict[str, object]] = []
    for i, (entry, cost) in enumerate(points):
        tip = f"{entry.name}\n{column_name(block.main)} {quality[i]:.4f}\n{axis_title(column)}: {show(cost)}"
        series = block.series_name(entry) or specs.OTHERS
        values.append({"x": cost, "y": quality[i], "series": series, "front": i in front, "tip": tip})
    numbers = [cost for _, cost in points]
    log = min(numbers) > 0 and max(numbers) / min(numbers) > LOG_FROM
    spec = _scatter(
        [*values],
        block.series,
        log,
        axis_title(column),
        column_name(block.main),
        any(e.series is None for e, _ in points),
    )
    rows: list[list[Cell]] = [[points[i][0].name, quality[i], show(points[i][1])] for i in front]
    title = f"{column_name(block.main)} against {axis_title(column)}"
    caption = (
        f"{pluralise(len(points), 'setting')}. The dashed line is the Pareto front: no other setting is better and "
        "costs no more."
    )
    header = ["on the front", column_name(block.main), axis_title(column)]
    return Figure(title, caption, spec, DataTable(f"The front: {title}", header, rows, style="front"), "wide")


def _scatter(
    values: Sequence[dict[str, object]], series: Sequence[str], log: bool, x_title: str, y_title: str, others: bool
) -> specs.Spec:
    """Return the specification of points and the front that joins some of them."""
    x = specs.quantity("x", x_title, log=log, axis={"format": "~s"})
    y = specs.quantity("y", y_title)
    front = {
        "mark": {"type": "line", "interpolate": "step-after", "stroke": "var(--soft)", "strokeDash": [4, 3]},
        "transform": [{"filter": "datum.front"}],
        "encoding": {"x": x, "y": y},
    }
    points = {
        "mark": {"type": "point", "filled": True, "size": 90},
        "encoding": {
            "x": x,
            "y": y,
            **specs.series_channels(series, others=others),
            "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.55},
            "tooltip": specs.TIP,
        },
    }
    return specs.chart(values, [front, points], height=320, **specs.legend_width(series))


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, quality) that no other point beats in one without losing in the other.

    The cheapest comes first.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front
