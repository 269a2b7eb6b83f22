"""Trade-offs: charts of quality against each cost, and against rank and learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.table import format_cell
from lora_bench.config.metric_names import display_name
from lora_bench.console.format import format_number
from lora_bench.report import axes
from lora_bench.report.charts import SERIES, Chart, legend, series_class
from lora_bench.report.html import Content, Markup, element, figure, join, pluralise, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.analysis.table import Column, Stat
    from lora_bench.report.series import Block, Entry

_COSTS = {
    "params.adapter": "adapter parameters",
    "params.head": "head parameters",
    "cost.train_seconds": "training time",
    "cost.train_flops": "training FLOPs",
    "cost.peak_memory_bytes": "peak memory",
    "params.total": "all parameters",
    "adapter_bytes": "bytes on disk",
    "steps_to_target": "steps to the target",
    "flops_to_target": "FLOPs to the target",
    "seconds_to_target": "seconds to the target",
}


def costs(block: Block) -> Markup | None:
    """Return a chart for each cost in which rows visibly differ, with the Pareto front."""
    figures = []
    for column in block.costs:
        points = [(entry, stat.mean) for entry in block.entries if (stat := entry.stat(column))]
        if len({cost_formatter(column)(cost) for _, cost in points}) > 1 and column.name != "params.head":
            figures.append(_cost(block, column, points))
    if not figures:
        return None
    return join([_legend(block), element("div", *figures, class_="figures")])


def _legend(block: Block) -> Markup:
    """Return the legend of methods, or of the chosen entries of a single method."""
    if len(block.methods) > 1:
        entries: list[tuple[int | None, str]] = [(series, name) for name, series in block.methods.items()]
    else:
        entries = [(entry.series, entry.name) for entry in block.chosen]
    if any(entry.series is None for entry in block.entries):
        entries.append((None, "others"))
    return legend(entries)


def _cost(block: Block, column: Column, points: list[tuple[Entry, float]]) -> Markup:
    """Return the chart of the main metric against one cost."""
    cost_name = _COSTS.get(column.name, column.name)
    values = {entry.number: mean_of(entry, block.main) for entry, _ in points}
    format_cost = cost_formatter(column)
    ratio = max(cost for _, cost in points) / min((cost for _, cost in points if cost > 0), default=1.0)
    make_axis = axes.logarithmic if ratio > 5 else axes.linear
    x = make_axis([cost for _, cost in points], f"{cost_name} →", format_cost, 4)
    chart = Chart(x, axes.linear(values.values(), column_header(block.main)))
    front = pareto([(cost, values[entry.number]) for entry, cost in points])
    chart.staircase([(cost, values[entry.number]) for entry, cost in (points[i] for i in front)], "front")
    by_prominence = sorted(range(len(points)), key=lambda i: (i in front, points[i][0].series is not None))
    for i in by_prominence:
        entry, cost = points[i]
        value = values[entry.number]
        tip = f"{entry.name}: {block.main.name} {value:.4f}, {cost_name} {format_cost(cost)}"
        chart.dot(cost, value, entry.series, tip, entry.number, "" if i in front else "beaten")
    for i in front:
        entry, cost = points[i]
        chart.label_point(cost, values[entry.number], entry.name)
    members = [points[i] for i in front]
    rows: list[list[Content]] = [[entry.name, values[entry.number], format_cost(cost)] for entry, cost in members]
    title = f"{column_name(block.main)} against {cost_name}"
    names = ", ".join(entry.name for entry, _ in members[:6]) + (" and more" if len(members) > 6 else "")
    caption = f"On the front: {names}."
    numbers = table(f"The front: {title}", ["experiment", block.main.name, column.name], rows)
    return figure(
        chart.svg(f"{title} of {pluralise(len(points), 'experiment')}. {caption}"), caption, numbers, title=title
    )


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, quality) that no other point beats in one without losing in the other.

    The cheapest comes first.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def by_rank(block: Block) -> Markup | None:
    """Return the chart of the main metric over ranks; None if no method has several."""
    return _by_key(block, "adapter.rank", "rank", lambda value: f"{value:g}")


def by_learning_rate(block: Block) -> Markup | None:
    """Return the chart of the main metric over learning rates; None if no method has several."""
    return _by_key(block, "optimizer.lr", "learning rate", lambda value: f"{value:g}")


def _by_key(block: Block, key: str, key_name: str, format_value: Callable[[float], str]) -> Markup | None:
    """Return the main metric over a numeric key: a line per method, with its best setting at each value."""
    lines, several_settings = {}, False
    for method in dict.fromkeys(entry.method for entry in block.entries):
        entries_by_value: dict[float, list[Entry]] = {}
        for entry in block.entries:
            value = entry.row.keys.get(key)
            if entry.method == method and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                entries_by_value.setdefault(float(value), []).append(entry)
        several_settings |= any(len(entries) > 1 for entries in entries_by_value.values())
        if len(entries_by_value) > 1:
            lines[method] = [
                (value, min(entries_by_value[value], key=lambda entry: entry.order))
                for value in sorted(entries_by_value)
            ]
    if not lines:
        return None
    drawn = dict(list(lines.items())[:SERIES])
    stats: dict[str, list[tuple[float, Stat]]] = {
        name: [(value, entry.row.stats[block.main.name]) for value, entry in line] for name, line in drawn.items()
    }
    heights = [bound for line in stats.values() for _, stat in line for bound in bounds(stat)]
    x = axes.logarithmic_at([value for line in stats.values() for value, _ in line], f"{key_name} →", format_value)
    chart = Chart(x, axes.linear(heights, column_header(block.main)), width=560, height=320)
    bars: list[list[Content]] = []
    for i, (name, line) in enumerate(drawn.items()):
        series = block.methods.get(name, i)
        chart.shift = 5 * (i - (len(drawn) - 1) / 2)
        for (value, stat), (_, entry) in zip(stats[name], line, strict=True):
            low, high = bounds(stat)
            if high > low:
                chart.interval(value, low, high, series_class(series), entry.number)
            bars.append(
                [entry.name, format_value(value), stat.mean, low if high > low else None, high if high > low else None]
            )
            bars[-1].append(stat.n)
        chart.line([(value, stat.mean) for value, stat in stats[name]], series_class(series))
        for value, stat in stats[name]:
            tip = f"{name}, {key_name} {format_value(value)}: {block.main.name} {stat.mean:.4f}"
            chart.dot(value, stat.mean, series, tip)
    chart.shift = 0
    title = f"{column_name(block.main)} by {key_name}"
    best = {name: max(line, key=lambda point: point[1].mean)[0] for name, line in stats.items()}
    caption = (
        f"Highest at {key_name} " + ", ".join(f"{format_value(value)} ({name})" for name, value in best.items()) + "."
    )
    if any(stat.n > 1 for line in stats.values() for _, stat in line):
        caption += " Bars: 95 % intervals of the mean over seeds (Student's t)."
    if several_settings:
        caption += " Where settings differ in other keys too, the best of them by the selection split is drawn."
    if len(lines) > len(drawn):
        caption += f" {len(lines) - len(drawn)} more methods are in the leaderboard."
    numbers = table(title, ["experiment", key_name, block.main.name, "95 % from", "to", "seeds"], bars)
    legend_entries: list[tuple[int | None, str]] = [
        (block.methods.get(name, i), name or "all") for i, name in enumerate(drawn)
    ]
    chart_figure = figure(chart.svg(f"{title}. {caption}"), caption, numbers, class_="wide")
    return join([legend(legend_entries) if len(legend_entries) > 1 else "", chart_figure])


def bounds(stat: Stat) -> tuple[float, float]:
    """Return the 95 % interval of a mean over seeds; the mean itself for one seed."""
    return stat.interval or (stat.mean, stat.mean)


def mean_of(entry: Entry, column: Column) -> float:
    """Return the mean of an entry's column."""
    return entry.row.stats[column.name].mean


def column_name(column: Column) -> str:
    """Return the name of a metric's column as papers spell it."""
    tail = column.name.rsplit("/", 1)[-1]
    return column.name.removesuffix(tail) + display_name(tail)


def column_header(column: Column) -> str:
    """Return `column_name` with the arrow of the better direction."""
    return f"{column_name(column)} {column.arrow}".strip()


def cost_formatter(column: Column) -> Callable[[float], str]:
    """Return a function that formats a value of a cost column as the table does."""
    from lora_bench.analysis.table import Row, Stat

    def format_cost(value: float) -> str:
        if value == 0:
            return "0"
        return format_cell(Row({}, {column.name: Stat(value, None, 1)}, 1, []), column)

    return format_cost if column.format != "count" else lambda value: format_number(value)
