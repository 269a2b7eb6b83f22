"""Figures of single runs: learning curves, calibration, and where an allocation put its ranks."""

from __future__ import annotations

import re
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.analysis.savings import up_to
from lora_bench.console.format import to_single_line
from lora_bench.records import predictions
from lora_bench.report import axes, folders
from lora_bench.report.axes import Axis
from lora_bench.report.charts import SERIES, Chart, legend, picture, series_class
from lora_bench.report.html import Content, Markup, el, figure, join, several, table
from lora_bench.report.tradeoffs import header

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lora_bench.report.series import Block, Entry

CURVES = 10
"""Runs of one row whose curves are drawn."""
POINTS = 60
"""Points of one curve that are drawn."""
DASHES = 4
"""Ways to draw a line: rows of one method have one colour."""
BINS = 10
HEAT_MAPS = 6


def curves(block: Block) -> Markup | None:
    """The main metric on the selection split while training went on, by step and by what was computed until then.

    Thin lines for runs, a thick one for the mean.
    """
    metric = block.main.name.rsplit("/", 1)[-1]
    found: dict[int, list[_Curve]] = {}
    few = len(block.entries) <= SERIES
    for entry in block.entries if few else block.chosen:
        lines = [(thinned(folders.curve(folder, metric)), record["cost"]) for folder, record in entry.runs[:CURVES]]
        found[entry.number] = [(line, cost) for line, cost in lines if len(line) > 1]
    shown = [entry for entry in (block.entries if few else block.chosen) if found[entry.number]]
    if not shown:
        return None
    before = [sum(other.series == entry.series for other in shown[:i]) for i, entry in enumerate(shown)]
    dashes = {entry.number: count % DASHES for entry, count in zip(shown, before, strict=True)}
    how = "" if few else f" {block.chosen_how}"
    if any(len(lines) > 1 for lines in found.values()):
        how += " Thick: the mean over seeds; thin: each run."
    label = f"{header(block.main)} on selection"
    figures = [_curves(shown, found, dashes, label, lambda cost, step: step, "step", "step", how)]
    costs_told = all(_told(cost) for lines in found.values() for _, cost in lines)
    if costs_told and len(shown) > 1:
        how = " Computed: training up to there, and all that came before its first step; not the looks themselves."
        figures.append(_curves(shown, found, dashes, label, _teraflops, "TFLOP", "computation, TFLOP", how))
    key = legend([(entry.series, entry.name) for entry in shown], list(dashes.values()))
    return join([key, *figures])


_Curve = tuple[list[tuple[float, float]], dict[str, Any]]
"""Step and value of a run's looks, and its cost."""


def _told(cost: dict[str, Any]) -> bool:
    return all(isinstance(cost.get(key), int | float) and cost[key] > 0 for key in ("steps", "train_flops"))


def _teraflops(cost: dict[str, Any], step: float) -> float:
    return up_to(cost, "flops", step) / 1e12


def _curves(
    shown: Sequence[Entry],
    found: dict[int, list[_Curve]],
    dashes: dict[int, int],
    label: str,
    place: Callable[[dict[str, Any], float], float],
    unit: str,
    said_unit: str,
    how: str,
) -> Markup:
    """One chart: `place` says where on its horizontal axis a run of some cost is at a step."""
    drawn = {
        number: [[(place(cost, step), value) for step, value in line] for line, cost in lines]
        for number, lines in found.items()
    }
    means = {entry.number: _mean(found[entry.number], place) for entry in shown}
    points = [point for lines in drawn.values() for line in lines for point in line]
    x = axes.linear([0, *(at for at, _ in points)], f"{said_unit} →", lambda value: f"{value:,g}")
    x = Axis(x.label, 0.0, max(at for at, _ in points), [tick for tick in x.ticks if tick[0] >= 0])
    chart = Chart(x, axes.linear([value for _, value in points], label), 560, 320)
    for entry in shown:
        if len(drawn[entry.number]) > 1:
            for line in drawn[entry.number]:
                chart.line(line, f"{series_class(entry.series)} faint dash{dashes[entry.number]}", entry.number)
    rows: list[list[Content]] = []
    for entry in shown:
        chart.line(means[entry.number], f"{series_class(entry.series)} dash{dashes[entry.number]}", entry.number)
        end, value = means[entry.number][-1]
        chart.dot(end, value, entry.series, f"{entry.name}: {value:.4f} at {_tidy(end):,} {unit}", entry.number)
        for at, value in means[entry.number]:
            rows.append([entry.name, _tidy(at), value, len(drawn[entry.number])])
    ends = sorted(((means[entry.number][-1][1], entry.name) for entry in shown), reverse=True)
    said = f"Highest at the end: {ends[0][1]} with {ends[0][0]:.4f}.{how}"
    numbers = table(f"Learning curves by {unit}, mean over runs", ["experiment", unit, label, "runs"], rows)
    return figure(chart.svg(f"Learning curves on the selection split, by {unit}. {said}"), said, numbers, class_="wide")


def _tidy(value: float) -> float | int:
    return int(value) if value == int(value) else float(f"{value:.4g}")


def thinned(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` of its points, ends included."""
    if len(line) <= POINTS:
        return line
    return [line[round(i * (len(line) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _mean(lines: Sequence[_Curve], place: Callable[[dict[str, Any], float], float]) -> list[tuple[float, float]]:
    """Over the steps that all lines have; the first line where they share none."""
    at = [dict(line) for line, _ in lines]
    used = [cost for _, cost in lines]
    shared = [step for step in at[0] if all(step in line for line in at)]
    if not shared:
        shared, at, used = list(at[0]), at[:1], used[:1]
    return [(fmean(place(cost, step) for cost in used), fmean(line[step] for line in at)) for step in shared]


def reliability(block: Block, split: str) -> Markup | None:
    """How often label 1 was right where it was given a probability, in `BINS` bins; runs of a row are pooled."""
    figures = []
    for entry in block.chosen:
        found = [predictions.read_if_usable(folder, split) for folder, _ in entry.runs]
        used = [one for one in found if one is not None]
        if used:
            scores = np.concatenate([one.scores for one in used])
            labels = np.concatenate([one.labels for one in used])
            figures.append(_reliability(entry, split, scores, labels))
    if not figures:
        return None
    said = (
        "On the diagonal a probability means what it says; below it the model is too sure of label 1. "
        f"Bars: how the probabilities are spread. {block.chosen_how}"
    )
    return join([el("p", said, class_="note"), el("div", *figures, class_="figures small")])


def _reliability(entry: Entry, split: str, scores: np.ndarray, labels: np.ndarray) -> Markup:
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = np.flatnonzero(counts)
    said_1 = np.bincount(bins, weights=scores, minlength=BINS)[filled] / counts[filled]
    was_1 = np.bincount(bins, weights=labels, minlength=BINS)[filled] / counts[filled]
    ticks = [(0.0, "0"), (0.5, "0.5"), (1.0, "1")]
    x, y = Axis("P(label 1) →", 0, 1, ticks), Axis("share of label 1", 0, 1, ticks)
    chart = Chart(x, y, width=260, height=240, left=34)
    tallest = counts.max()
    bars = []
    for i in filled.tolist():
        height = 0.25 * counts[i] / tallest
        left, right, top, bottom = chart.px(i / BINS) + 1, chart.px((i + 1) / BINS) - 1, chart.py(height), chart.py(0)
        bar = el("title", f"{several(int(counts[i]), 'prediction')} from {i / BINS:.1f} to {(i + 1) / BINS:.1f}")
        bars.append(el("rect", bar, x=left, y=top, width=right - left, height=float(bottom - top), class_="bar"))
    chart.line([(0, 0), (1, 1)], "diagonal")
    series = entry.series
    chart.line(list(zip(said_1.tolist(), was_1.tolist(), strict=True)), series_class(series))
    for i, p, share in zip(filled.tolist(), said_1.tolist(), was_1.tolist(), strict=True):
        tip = f"mean P {p:.3f}, label 1 in {share:.3f} of {several(int(counts[i]), 'prediction')}"
        chart.dot(p, share, series, tip)
    eces = [record["metrics"].get(f"{split}/ece") for _, record in entry.runs]
    numbers = [value for value in eces if isinstance(value, int | float)]
    said = (
        f"ECE {fmean(numbers):.4f}" + (f", mean of {len(numbers)} runs" if len(numbers) > 1 else "") if numbers else ""
    )
    rows: list[list[Content]] = [
        [f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}", int(counts[i]), p, share]
        for i, p, share in zip(filled.tolist(), said_1.tolist(), was_1.tolist(), strict=True)
    ]
    data = table(f"Calibration of {entry.name}", ["P(label 1)", "predictions", "mean P", "share of label 1"], rows)
    return figure(chart.svg(f"Reliability diagram of {entry.name}. {said}", bars), said, data, title=entry.name)


def allocation(block: Block) -> Markup | None:
    """The rank of each adapted linear, by layer and module: of rows whose ranks are not all the same."""
    maps, uneven = [], 0
    for entry in block.entries:
        ranks = _targets(entry.runs)
        if len(set(ranks.values())) > 1 or any(value != round(value) for value in ranks.values()):
            uneven += 1
            if uneven <= HEAT_MAPS and (made := _heat_map(entry, ranks)) is not None:
                maps.append(made)
    if not maps:
        return None
    note = f"The first {len(maps)} of {uneven} experiments with ranks that differ." if uneven > len(maps) else ""
    return join([el("p", note, class_="note") if note else "", el("div", *maps, class_="figures")])


def _targets(runs: Sequence[tuple[Path, dict[str, object]]]) -> dict[str, float]:
    """The mean rank of each linear over the runs."""
    found: dict[str, list[float]] = {}
    for _, record in runs:
        targets = record["targets"]
        assert isinstance(targets, dict)
        for name, rank in targets.items():
            if isinstance(rank, int | float) and not isinstance(rank, bool):
                found.setdefault(name, []).append(float(rank))
    return {name: fmean(values) for name, values in found.items()}


def _heat_map(entry: Entry, ranks: dict[str, float]) -> Markup | None:
    cells: dict[tuple[int, str], float] = {}
    for name, rank in ranks.items():
        place = re.search(r"\.(\d+)\.(.+)$", name)
        if place:
            cells[int(place[1]), place[2]] = rank
    if not cells:
        return None
    layers, modules = sorted({layer for layer, _ in cells}), list(dict.fromkeys(module for _, module in cells))
    short = _short_names(modules)
    size, left, top = 30.0, 8 + 6.4 * max(map(len, short)), 20.0
    width, height = left + size * len(layers) + 8, top + size * len(modules) + 24
    most = max(cells.values()) or 1.0
    drawn = [el("text", "layer →", x=width - 8, y=height - 4, text_anchor="end", class_="axis")]
    for column, layer in enumerate(layers):
        middle = left + size * (column + 0.5)
        drawn.append(el("text", layer, x=middle, y=top - 7, text_anchor="middle", class_="tick"))
        for row, module in enumerate(modules):
            if (layer, module) not in cells:
                continue
            rank = cells[layer, module]
            y = top + size * row
            level = round(8 * rank / most)
            tip = el("title", f"layer {layer}, {module}: rank {rank:.4g}")
            box = el(
                "rect", tip, x=left + size * column + 1, y=y + 1, width=size - 2, height=size - 2, class_=f"h{level}"
            )
            shown = f"{rank:.0f}" if rank == round(rank) or rank >= 10 else f"{rank:.1f}"
            on = f"tick on{level > 4:d}"
            drawn += [box, el("text", shown, x=middle, y=y + size / 2 + 4, text_anchor="middle", class_=on)]
    for row, tail in enumerate(short):
        drawn.append(el("text", tail, x=left - 6, y=top + size * (row + 0.5) + 4, text_anchor="end", class_="tick"))
    total = sum(cells.values())
    high = max(cells, key=lambda place: cells[place])
    said = (
        f"Ranks from {min(cells.values()):.3g} to {most:.3g}, {total / len(cells):.3g} on average; "
        f"the highest at layer {high[0]}, {to_single_line(high[1])}."
    )
    if len(entry.runs) > 1:
        said += f" Mean of {len(entry.runs)} runs."
    rows: list[list[Content]] = [
        [module, *(f"{cells[layer, module]:.4g}" if (layer, module) in cells else None for layer in layers)]
        for module in modules
    ]
    data = table(f"Ranks of {entry.name}", ["module", *(f"layer {layer}" for layer in layers)], rows)
    chart = picture(join(drawn), width, height, f"Heat map of the ranks of {entry.name}. {said}", "heat")
    return figure(chart, said, data, title=entry.name)


def _short_names(modules: Sequence[str]) -> list[str]:
    """Each name's last part, with as many parts before it as tell it from the others."""
    names = []
    for module in modules:
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            tail = ".".join(parts[-n:])
            if sum(other == tail or other.endswith(f".{tail}") for other in modules) == 1:
                break
        names.append(tail)
    return names
