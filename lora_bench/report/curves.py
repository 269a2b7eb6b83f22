"""Learning curves: the main metric on the selection split during training."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.savings import cost_up_to
from lora_bench.files.untrusted import as_number
from lora_bench.records import metrics_log
from lora_bench.records.run_folder import METRICS_FILE
from lora_bench.report import specs
from lora_bench.report.blocks import column_name
from lora_bench.report.content import DataTable, Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

RUNS = 10
"""Runs of one setting whose curves are drawn."""
POINTS = 60
"""Points of one curve that are drawn."""

Curve = tuple[list[tuple[float, float]], dict[str, Any]]
"""Step and value of a run's evaluations, and the cost of its record."""


def curves(block: Block) -> list[Content]:
    """Return the learning curves by step and, where costs are known, by FLOPs; empty if there are none."""
    loaded = {entry.number: _load(entry, block.metric) for entry in block.chosen}
    drawn = [entry for entry in block.chosen if loaded[entry.number]]
    if not drawn:
        return []
    remark = f" {block.chosen_note}" if block.chosen_note else ""
    if any(len(lines) > 1 for lines in loaded.values()):
        remark += " Thick: the mean over seeds; thin: each run."
    contents: list[Content] = [_figure(block, drawn, loaded, lambda cost, step: step, "step", remark)]
    if len(drawn) > 1 and all(_has_costs(cost) for lines in loaded.values() for _, cost in lines):
        remark = " FLOPs count the steps so far and all that preceded the first one, without evaluations."
        contents.append(
            _figure(block, drawn, loaded, lambda cost, step: cost_up_to(cost, "flops", step), "FLOPs", remark)
        )
    return contents


def _load(entry: Entry, metric: str) -> list[Curve]:
    """Return the curves of an entry's runs that have at least two points."""
    lines = [
        (thin_out(metrics_log.selection_curve(folder / METRICS_FILE, metric)), record["cost"])
        for folder, record in entry.runs[:RUNS]
    ]
    return [(line, cost) for line, cost in lines if len(line) > 1]


def mean_curve(entry: Entry, metric: str) -> list[tuple[float, float]]:
    """Return the mean curve over an entry's runs; empty if there is none."""
    lines = _load(entry, metric)
    return [(step, round(value, 5)) for step, value in _mean(lines, lambda _, step: step)] if lines else []


def _has_costs(cost: dict[str, Any]) -> bool:
    """Return whether a record has steps and FLOPs."""
    return all((as_number(cost.get(key)) or 0) > 0 for key in ("steps", "train_flops"))


def _figure(
    block: Block,
    drawn: Sequence[Entry],
    loaded: dict[int, list[Curve]],
    position: Callable[[dict[str, Any], float], float],
    unit: str,
    remark: str,
) -> Figure:
    """Return one chart; `position` gives the horizontal value of a run with some cost at a step."""
    runs: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    rows: list[list[Cell]] = []
    for entry in drawn:
        series, lines = block.series_name(entry), loaded[entry.number]
        for i, (line, cost) in enumerate(lines if len(lines) > 1 else []):
            runs += [{"series": series, "run": i, "x": position(cost, step), "y": value} for step, value in line]
        mean = _mean(lines, position)
        for i, (x_value, value) in enumerate(mean):
            tip = f"{entry.name}\n{unit} {x_value:,.4g}: {value:.4f}"
            means.append({"series": series, "x": x_value, "y": value, "last": i == len(mean) - 1, "tip": tip})
            rows.append([entry.name, _tidy(x_value), value, len(lines)])
    metric = column_name(block.main).rsplit("/", 1)[-1]
    x = specs.quantity("x", unit, axis={"format": "~s"}, scale={"zero": True, "padding": 0})
    y = specs.quantity("y", f"{metric} on the selection split")
    channels = specs.series_channels([block.series[entry.series or 0] for entry in drawn])
    channels = {name: channel | {"scale": _scale(block, name)} for name, channel in channels.items()}
    colour = {"color": channels["color"]}
    layers: list[specs.Spec] = [
        {
            "data": {"values": runs},
            "mark": {"type": "line", "strokeWidth": 1, "opacity": 0.35},
            "encoding": {"x": x, "y": y, **colour, "detail": {"field": "run", "type": "nominal"}},
        },
        {"mark": {"type": "line", "strokeWidth": 2.4}, "encoding": {"x": x, "y": y, **colour}},
        {
            "mark": {"type": "point", "filled": True, "opacity": 1},
            "encoding": {
                "x": x,
                "y": y,
                **channels,
                "size": {"condition": {"test": "datum.last", "value": 110}, "value": 36},
                "tooltip": specs.TIP,
            },
        },
    ]
    spec = specs.chart(means, layers, height=300, **specs.legend_width(block.series))
    title = f"Learning curves by {unit}"
    numbers = DataTable(f"{title}, mean over runs", ["setting", unit, f"selection {metric}", "runs"], rows)
    return Figure(title, f"{metric} on the selection split.{remark}", spec, numbers, "wide")


def _scale(block: Block, channel: str) -> dict[str, Any]:
    """Return the scale of colour or shape of all series of the block, so that a colour means the same everywhere."""
    scale: dict[str, Any] = specs.series_channels(block.series)[channel]["scale"]
    return scale


def _tidy(value: float) -> float | int:
    """Return a number for display: whole, or with four significant digits."""
    return int(value) if value == int(value) else float(f"{value:.4g}")


def thin_out(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `POINTS` points of a line, ends included."""
    if len(line) <= POINTS:
        return line
    return [line[round(i * (len(line) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _mean(lines: Sequence[Curve], position: Callable[[dict[str, Any], float], float]) -> list[tuple[float, float]]:
    """Return the mean over the steps that all lines have; the first line if they share none."""
    values = [dict(line) for line, _ in lines]
    used_costs = [cost for _, cost in lines]
    shared = [step for step in values[0] if all(step in line for line in values)]
    if not shared:
        shared, values, used_costs = list(values[0]), values[:1], used_costs[:1]
    return [
        (fmean(position(cost, step) for cost in used_costs), fmean(line[step] for line in values)) for step in shared
    ]
