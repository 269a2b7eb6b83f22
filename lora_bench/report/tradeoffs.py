"""Figures over the rows of the table: quality against each cost, and against rank and learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.columns import NAMES
from lora_bench.analysis.table import cell
from lora_bench.console.format import format_number
from lora_bench.report import axes
from lora_bench.report.charts import SERIES, Chart, legend, series_class
from lora_bench.report.html import Content, Markup, el, figure, join, several, table

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
    """A chart for each cost that rows visibly differ in, with the front of rows that nothing beats in both."""
    figures = []
    for column in block.costs:
        points = [(entry, stat.mean) for entry in block.entries if (stat := entry.stat(column))]
        if len({shown_as(column)(cost) for _, cost in points}) > 1 and column.name != "params.head":
            figures.append(_cost(block, column, points))
    if not figures:
        return None
    return join([_legend(block), el("div", *figures, class_="figures")])


def _legend(block: Block) -> Markup:
    if len(block.methods) > 1:
        entries: list[tuple[int | None, str]] = [(series, name) for name, series in block.methods.items()]
    else:
        entries = [(entry.series, entry.name) for entry in block.chosen]
    if any(entry.series is None for entry in block.entries):
        entries.append((None, "others"))
    return legend(entries)


def _cost(block: Block, column: Column, points: list[tuple[Entry, float]]) -> Markup:
    what = _COSTS.get(column.name, column.name)
    values = {entry.number: mean_of(entry, block.main) for entry, _ in points}
    show = shown_as(column)
    spread = max(cost for _, cost in points) / min((cost for _, cost in points if cost > 0), default=1.0)
    kind = axes.logarithmic if spread > 5 else axes.linear
    x = kind([cost for _, cost in points], f"{what} →", show, 4)
    chart = Chart(x, axes.linear(values.values(), header(block.main)))
    front = pareto([(cost, values[entry.number]) for entry, cost in points])
    chart.staircase([(cost, values[entry.number]) for entry, cost in (points[i] for i in front)], "front")
    by_prominence = sorted(range(len(points)), key=lambda i: (i in front, points[i][0].series is not None))
    for i in by_prominence:
        entry, cost = points[i]
        value = values[entry.number]
        tip = f"{entry.name}: {block.main.name} {value:.4f}, {what} {show(cost)}"
        chart.dot(cost, value, entry.series, tip, entry.number, "" if i in front else "beaten")
    for i in front:
        entry, cost = points[i]
        chart.name(cost, values[entry.number], entry.name)
    members = [points[i] for i in front]
    rows: list[list[Content]] = [[entry.name, values[entry.number], show(cost)] for entry, cost in members]
    title = f"{spelt(block.main)} against {what}"
    names = ", ".join(entry.name for entry, _ in members[:6]) + (" and more" if len(members) > 6 else "")
    said = f"On the front: {names}."
    numbers = table(f"The front: {title}", ["experiment", block.main.name, column.name], rows)
    return figure(chart.svg(f"{title} of {several(len(points), 'experiment')}. {said}"), said, numbers, title=title)


def pareto(points: list[tuple[float, float]]) -> list[int]:
    """Which points (cost, quality) no other beats in one without losing in the other, cheapest first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def by_rank(block: Block) -> Markup | None:
    return _by_key(block, "adapter.rank", "rank", lambda value: f"{value:g}")


def by_rate(block: Block) -> Markup | None:
    return _by_key(block, "optimizer.lr", "learning rate", lambda value: f"{value:g}")


def _by_key(block: Block, key: str, what: str, show: Callable[[float], str]) -> Markup | None:
    """The main metric over the values of a numeric key, a line for each method: at each value its best setting."""
    lines, several_each = {}, False
    for method in dict.fromkeys(entry.method for entry in block.entries):
        at: dict[float, list[Entry]] = {}
        for entry in block.entries:
            value = entry.row.keys.get(key)
            if entry.method == method and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                at.setdefault(float(value), []).append(entry)
        several_each |= any(len(same) > 1 for same in at.values())
        if len(at) > 1:
            lines[method] = [(value, min(at[value], key=lambda entry: entry.order)) for value in sorted(at)]
    if not lines:
        return None
    drawn = dict(list(lines.items())[:SERIES])
    stats: dict[str, list[tuple[float, Stat]]] = {
        name: [(value, entry.row.stats[block.main.name]) for value, entry in line] for name, line in drawn.items()
    }
    heights = [bound for line in stats.values() for _, stat in line for bound in bounds(stat)]
    x = axes.at_values([value for line in stats.values() for value, _ in line], f"{what} →", show)
    chart = Chart(x, axes.linear(heights, header(block.main)), width=560, height=320)
    bars: list[list[Content]] = []
    for i, (name, line) in enumerate(drawn.items()):
        series = block.methods.get(name, i)
        chart.shift = 5 * (i - (len(drawn) - 1) / 2)
        for (value, stat), (_, entry) in zip(stats[name], line, strict=True):
            low, high = bounds(stat)
            if high > low:
                chart.interval(value, low, high, series_class(series), entry.number)
            bars.append([entry.name, show(value), stat.mean, low if high > low else None, high if high > low else None])
            bars[-1].append(stat.n)
        chart.line([(value, stat.mean) for value, stat in stats[name]], series_class(series))
        for value, stat in stats[name]:
            tip = f"{name}, {what} {show(value)}: {block.main.name} {stat.mean:.4f}"
            chart.dot(value, stat.mean, series, tip)
    chart.shift = 0
    title = f"{spelt(block.main)} by {what}"
    best = {name: max(line, key=lambda point: point[1].mean)[0] for name, line in stats.items()}
    said = f"Highest at {what} " + ", ".join(f"{show(value)} ({name})" for name, value in best.items()) + "."
    if any(stat.n > 1 for line in stats.values() for _, stat in line):
        said += " Bars: 95 % intervals of the mean over seeds (Student's t)."
    if several_each:
        said += " Where settings differ in other keys too, the best of them by the selection split is drawn."
    if len(lines) > len(drawn):
        said += f" {len(lines) - len(drawn)} more methods are in the leaderboard."
    numbers = table(title, ["experiment", what, block.main.name, "95 % from", "to", "seeds"], bars)
    names: list[tuple[int | None, str]] = [(block.methods.get(name, i), name or "all") for i, name in enumerate(drawn)]
    made = figure(chart.svg(f"{title}. {said}"), said, numbers, class_="wide")
    return join([legend(names) if len(names) > 1 else "", made])


def bounds(stat: Stat) -> tuple[float, float]:
    """The 95 % interval of a mean over seeds; the mean itself where there is one seed."""
    return stat.interval or (stat.mean, stat.mean)


def mean_of(entry: Entry, column: Column) -> float:
    return entry.row.stats[column.name].mean


def spelt(column: Column) -> str:
    """A metric's name as papers spell it."""
    tail = column.name.rsplit("/", 1)[-1]
    return column.name.removesuffix(tail) + NAMES.get(tail, tail)


def header(column: Column) -> str:
    """The same with the arrow that says which way is better."""
    return f"{spelt(column)} {column.arrow}".strip()


def shown_as(column: Column) -> Callable[[float], str]:
    """How the table shows a value of a column of costs."""
    from lora_bench.analysis.table import Row, Stat

    def show(value: float) -> str:
        if value == 0:
            return "0"
        return cell(Row({}, {column.name: Stat(value, None, 1)}, 1, []), column)

    return show if column.kind != "count" else lambda value: format_number(value)
