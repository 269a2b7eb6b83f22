"""Charts of single runs: learning curves, calibration, and the ranks of an allocation."""

from __future__ import annotations

import re
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.analysis.savings import cost_up_to
from lora_bench.console.format import to_single_line
from lora_bench.records import metrics_log, predictions
from lora_bench.records.run_folder import METRICS_FILE
from lora_bench.report import axes
from lora_bench.report.axes import Axis
from lora_bench.report.charts import SERIES, Chart, legend, series_class, svg_image
from lora_bench.report.html import Content, Markup, element, figure, join, pluralise, table
from lora_bench.report.tradeoffs import column_header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lora_bench.report.series import Block, Entry

CURVES = 10
"""Runs of one row whose curves are drawn."""
POINTS = 60
"""Points of one curve that are drawn."""
DASHES = 4
"""Kinds of line, which distinguish rows of one method: they have one colour."""
BINS = 10
"""Bins of a reliability diagram."""
HEAT_MAPS = 6
"""Experiments whose ranks are drawn."""


def curves(block: Block) -> Markup | None:
    """Return the main metric on the selection split during training, by step and by computation.

    Thin lines are runs, thick ones means over seeds.
    """
    metric = block.main.name.rsplit("/", 1)[-1]
    curves_by_entry: dict[int, list[_Curve]] = {}
    all_drawn = len(block.entries) <= SERIES
    for entry in block.entries if all_drawn else block.chosen:
        lines = [
            (thin_out(metrics_log.selection_curve(folder / METRICS_FILE, metric)), record["cost"])
            for folder, record in entry.runs[:CURVES]
        ]
        curves_by_entry[entry.number] = [(line, cost) for line, cost in lines if len(line) > 1]
    drawn_entries = [entry for entry in (block.entries if all_drawn else block.chosen) if curves_by_entry[entry.number]]
    if not drawn_entries:
        return None
    earlier_of_series = [
        sum(other.series == entry.series for other in drawn_entries[:i]) for i, entry in enumerate(drawn_entries)
    ]
    dashes = {entry.number: count % DASHES for entry, count in zip(drawn_entries, earlier_of_series, strict=True)}
    remark = "" if all_drawn else f" {block.chosen_how}"
    if any(len(lines) > 1 for lines in curves_by_entry.values()):
        remark += " Thick: the mean over seeds; thin: each run."
    label = f"{column_header(block.main)} on selection"
    figures = [_curves(drawn_entries, curves_by_entry, dashes, label, lambda cost, step: step, "step", "step", remark)]
    costs_known = all(_has_costs(cost) for lines in curves_by_entry.values() for _, cost in lines)
    if costs_known and len(drawn_entries) > 1:
        remark = " Computation: the steps so far and all that preceded the first one, without evaluations."
        figures.append(
            _curves(drawn_entries, curves_by_entry, dashes, label, _teraflops, "TFLOP", "computation, TFLOP", remark)
        )
    key = legend([(entry.series, entry.name) for entry in drawn_entries], list(dashes.values()))
    return join([key, *figures])


_Curve = tuple[list[tuple[float, float]], dict[str, Any]]
"""Step and value of a run's evaluations, and the cost of its record."""


def _has_costs(cost: dict[str, Any]) -> bool:
    """Return whether a record has steps and FLOPs."""
    return all(isinstance(cost.get(key), int | float) and cost[key] > 0 for key in ("steps", "train_flops"))


def _teraflops(cost: dict[str, Any], step: float) -> float:
    """Return the computation of a run up to a step."""
    return cost_up_to(cost, "flops", step) / 1e12


def _curves(
    drawn_entries: Sequence[Entry],
    curves_by_entry: dict[int, list[_Curve]],
    dashes: dict[int, int],
    label: str,
    position: Callable[[dict[str, Any], float], float],
    unit: str,
    axis_label: str,
    remark: str,
) -> Markup:
    """Return one chart; `position` gives the horizontal value of a run with some cost at a step."""
    drawn = {
        number: [[(position(cost, step), value) for step, value in line] for line, cost in lines]
        for number, lines in curves_by_entry.items()
    }
    means = {entry.number: _mean(curves_by_entry[entry.number], position) for entry in drawn_entries}
    points = [point for lines in drawn.values() for line in lines for point in line]
    x = axes.linear([0, *(x_value for x_value, _ in points)], f"{axis_label} →", lambda value: f"{value:,g}")
    x = Axis(x.label, 0.0, max(x_value for x_value, _ in points), [tick for tick in x.ticks if tick[0] >= 0])
    chart = Chart(x, axes.linear([value for _, value in points], label), 560, 320)
    for entry in drawn_entries:
        if len(drawn[entry.number]) > 1:
            for line in drawn[entry.number]:
                chart.line(line, f"{series_class(entry.series)} faint dash{dashes[entry.number]}", entry.number)
    rows: list[list[Content]] = []
    for entry in drawn_entries:
        chart.line(means[entry.number], f"{series_class(entry.series)} dash{dashes[entry.number]}", entry.number)
        x_value, value = means[entry.number][-1]
        chart.dot(x_value, value, entry.series, f"{entry.name}: {value:.4f} at {_tidy(x_value):,} {unit}", entry.number)
        for x_value, value in means[entry.number]:
            rows.append([entry.name, _tidy(x_value), value, len(drawn[entry.number])])
    ends = sorted(((means[entry.number][-1][1], entry.name) for entry in drawn_entries), reverse=True)
    caption = f"Highest at the end: {ends[0][1]} with {ends[0][0]:.4f}.{remark}"
    numbers = table(f"Learning curves by {unit}, mean over runs", ["experiment", unit, label, "runs"], rows)
    return figure(
        chart.svg(f"Learning curves on the selection split, by {unit}. {caption}"), caption, numbers, class_="wide"
    )


def _tidy(value: float) -> float | int:
    """Return a number for display: whole, or with four significant digits."""
    return int(value) if value == int(value) else float(f"{value:.4g}")


def thin_out(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `POINTS` points of a line, ends included."""
    if len(line) <= POINTS:
        return line
    return [line[round(i * (len(line) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _mean(lines: Sequence[_Curve], position: Callable[[dict[str, Any], float], float]) -> list[tuple[float, float]]:
    """Return the mean over the steps that all lines have; the first line if they share none."""
    curves = [dict(line) for line, _ in lines]
    used_costs = [cost for _, cost in lines]
    shared = [step for step in curves[0] if all(step in line for line in curves)]
    if not shared:
        shared, curves, used_costs = list(curves[0]), curves[:1], used_costs[:1]
    return [
        (fmean(position(cost, step) for cost in used_costs), fmean(line[step] for line in curves)) for step in shared
    ]


def reliability(block: Block, split: str) -> Markup | None:
    """Return reliability diagrams: the share of label 1 by predicted probability, in `BINS` bins.

    The runs of a row are pooled.
    """
    figures = []
    for entry in block.chosen:
        predictions_of_runs = [predictions.read_if_usable(folder, split) for folder, _ in entry.runs]
        usable = [run for run in predictions_of_runs if run is not None]
        if usable:
            scores = np.concatenate([run.scores for run in usable])
            labels = np.concatenate([run.labels for run in usable])
            figures.append(_reliability(entry, split, scores, labels))
    if not figures:
        return None
    caption = (
        "On the diagonal a probability means what it says; below it the model is too sure of label 1. "
        f"Bars: how the probabilities are spread. {block.chosen_how}"
    )
    return join([element("p", caption, class_="note"), element("div", *figures, class_="figures small")])


def _reliability(entry: Entry, split: str, scores: np.ndarray, labels: np.ndarray) -> Markup:
    """Return the reliability diagram of one entry."""
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = np.flatnonzero(counts)
    mean_scores = np.bincount(bins, weights=scores, minlength=BINS)[filled] / counts[filled]
    label_shares = np.bincount(bins, weights=labels, minlength=BINS)[filled] / counts[filled]
    ticks = [(0.0, "0"), (0.5, "0.5"), (1.0, "1")]
    x, y = Axis("P(label 1) →", 0, 1, ticks), Axis("share of label 1", 0, 1, ticks)
    chart = Chart(x, y, width=260, height=240, margin_left=34)
    tallest = counts.max()
    bars = []
    for i in filled.tolist():
        height = 0.25 * counts[i] / tallest
        x_start, x_end, top, bottom = (
            chart.px(i / BINS) + 1,
            chart.px((i + 1) / BINS) - 1,
            chart.py(height),
            chart.py(0),
        )
        bar_tip = element(
            "title", f"{pluralise(int(counts[i]), 'prediction')} from {i / BINS:.1f} to {(i + 1) / BINS:.1f}"
        )
        bars.append(
            element("rect", bar_tip, x=x_start, y=top, width=x_end - x_start, height=float(bottom - top), class_="bar")
        )
    chart.line([(0, 0), (1, 1)], "diagonal")
    series = entry.series
    chart.line(list(zip(mean_scores.tolist(), label_shares.tolist(), strict=True)), series_class(series))
    for i, p, share in zip(filled.tolist(), mean_scores.tolist(), label_shares.tolist(), strict=True):
        tip = f"mean P {p:.3f}, label 1 in {share:.3f} of {pluralise(int(counts[i]), 'prediction')}"
        chart.dot(p, share, series, tip)
    eces = [record["metrics"].get(f"{split}/ece") for _, record in entry.runs]
    numbers = [value for value in eces if isinstance(value, int | float)]
    caption = (
        f"ECE {fmean(numbers):.4f}" + (f", mean of {len(numbers)} runs" if len(numbers) > 1 else "") if numbers else ""
    )
    rows: list[list[Content]] = [
        [f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}", int(counts[i]), p, share]
        for i, p, share in zip(filled.tolist(), mean_scores.tolist(), label_shares.tolist(), strict=True)
    ]
    data = table(f"Calibration of {entry.name}", ["P(label 1)", "predictions", "mean P", "share of label 1"], rows)
    return figure(chart.svg(f"Reliability diagram of {entry.name}. {caption}", bars), caption, data, title=entry.name)


def allocation(block: Block) -> Markup | None:
    """Return heat maps of ranks by layer and module, for rows whose ranks are not all equal."""
    maps, uneven = [], 0
    for entry in block.entries:
        ranks = _mean_ranks(entry.runs)
        if len(set(ranks.values())) > 1 or any(value != round(value) for value in ranks.values()):
            uneven += 1
            if uneven <= HEAT_MAPS and (heat_map := _heat_map(entry, ranks)) is not None:
                maps.append(heat_map)
    if not maps:
        return None
    note = f"The first {len(maps)} of {uneven} experiments with ranks that differ." if uneven > len(maps) else ""
    return join([element("p", note, class_="note") if note else "", element("div", *maps, class_="figures")])


def _mean_ranks(runs: Sequence[tuple[Path, dict[str, object]]]) -> dict[str, float]:
    """Return the mean rank of each adapted linear over the runs."""
    ranks_by_name: dict[str, list[float]] = {}
    for _, record in runs:
        targets = record["targets"]
        assert isinstance(targets, dict)
        for name, rank in targets.items():
            if isinstance(rank, int | float) and not isinstance(rank, bool):
                ranks_by_name.setdefault(name, []).append(float(rank))
    return {name: fmean(values) for name, values in ranks_by_name.items()}


def _heat_map(entry: Entry, ranks: dict[str, float]) -> Markup | None:
    """Return the heat map of one entry's ranks; None if no module name has a layer number."""
    cells: dict[tuple[int, str], float] = {}
    for name, rank in ranks.items():
        match = re.search(r"\.(\d+)\.(.+)$", name)
        if match:
            cells[int(match[1]), match[2]] = rank
    if not cells:
        return None
    layers, modules = sorted({layer for layer, _ in cells}), list(dict.fromkeys(module for _, module in cells))
    short_names = _short_names(modules)
    size, margin_left, top = 30.0, 8 + 6.4 * max(map(len, short_names)), 20.0
    width, height = margin_left + size * len(layers) + 8, top + size * len(modules) + 24
    highest = max(cells.values()) or 1.0
    drawn = [element("text", "layer →", x=width - 8, y=height - 4, text_anchor="end", class_="axis")]
    for column, layer in enumerate(layers):
        middle = margin_left + size * (column + 0.5)
        drawn.append(element("text", layer, x=middle, y=top - 7, text_anchor="middle", class_="tick"))
        for row, module in enumerate(modules):
            if (layer, module) not in cells:
                continue
            rank = cells[layer, module]
            y = top + size * row
            level = round(8 * rank / highest)
            tip = element("title", f"layer {layer}, {module}: rank {rank:.4g}")
            box = element(
                "rect",
                tip,
                x=margin_left + size * column + 1,
                y=y + 1,
                width=size - 2,
                height=size - 2,
                class_=f"h{level}",
            )
            rank_text = f"{rank:.0f}" if rank == round(rank) or rank >= 10 else f"{rank:.1f}"
            tick_class = f"tick on{level > 4:d}"
            drawn += [
                box,
                element("text", rank_text, x=middle, y=y + size / 2 + 4, text_anchor="middle", class_=tick_class),
            ]
    for row, tail in enumerate(short_names):
        drawn.append(
            element("text", tail, x=margin_left - 6, y=top + size * (row + 0.5) + 4, text_anchor="end", class_="tick")
        )
    total = sum(cells.values())
    highest_at = max(cells, key=lambda cell: cells[cell])
    caption = (
        f"Ranks from {min(cells.values()):.3g} to {highest:.3g}, {total / len(cells):.3g} on average; "
        f"the highest at layer {highest_at[0]}, {to_single_line(highest_at[1])}."
    )
    if len(entry.runs) > 1:
        caption += f" Mean of {len(entry.runs)} runs."
    rows: list[list[Content]] = [
        [module, *(f"{cells[layer, module]:.4g}" if (layer, module) in cells else None for layer in layers)]
        for module in modules
    ]
    data = table(f"Ranks of {entry.name}", ["module", *(f"layer {layer}" for layer in layers)], rows)
    chart = svg_image(join(drawn), width, height, f"Heat map of the ranks of {entry.name}. {caption}", "heat")
    return figure(chart, caption, data, title=entry.name)


def _short_names(modules: Sequence[str]) -> list[str]:
    """Return each name's last word, with as many words before it as make it unique."""
    names = []
    for module in modules:
        words = module.split(".")
        for n in range(1, len(words) + 1):
            name = ".".join(words[-n:])
            if sum(other == name or other.endswith(f".{name}") for other in modules) == 1:
                break
        names.append(name)
    return names
