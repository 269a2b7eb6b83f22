"""Predicted numbers against their labels, for regression tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.records import predictions
from lora_bench.report import specs
from lora_bench.report.content import DataTable, Figure, Grid, Paragraph

if TYPE_CHECKING:
    from lora_bench.records.predictions import Predictions
    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

POINTS = 400
"""Examples of a run that are drawn."""
BINS = 10
"""Rows of the table of numbers."""


def scatter(block: Block) -> list[Content]:
    """Return a scatter plot for each chosen setting; empty for tasks of classes and without predictions."""
    if block.form != "regression":
        return []
    figures = []
    for entry in block.chosen:
        loaded = (predictions.read_if_usable(folder, block.split) for folder, _ in entry.runs)
        run = next((run for run in loaded if run is not None and run.form == "regression"), None)
        if run is not None:
            figures.append(_figure(entry, run))
    if not figures:
        return []
    note = f"On the diagonal a prediction is its label. The first run of each setting. {block.chosen_note}"
    return [Paragraph(note.strip()), Grid(figures, "small")]


def _figure(entry: Entry, run: Predictions) -> Figure:
    """Return the scatter plot of one run, and its mean error by label."""
    drawn = np.unique(np.linspace(0, len(run.ids) - 1, POINTS).astype(int))
    values = [
        {"x": round(label, 4), "y": round(score, 4), "tip": f"id {row}\nlabel {label:.3f}, prediction {score:.3f}"}
        for row, label, score in zip(*(x[drawn].tolist() for x in (run.ids, run.labels, run.scores)), strict=True)
    ]
    low, high = (
        float(edge) for edge in (min(run.labels.min(), run.scores.min()), max(run.labels.max(), run.scores.max()))
    )
    unit: dict[str, Any] = {"scale": {"domain": [low, high], "nice": True}}
    x, y = specs.quantity("x", "label", **unit), specs.quantity("y", "prediction", **unit)
    colour = f"var(--s{entry.series or 0})"
    diagonal = {"values": [{"x": low, "y": low}, {"x": high, "y": high}]}
    line = {"type": "line", "stroke": "var(--soft)", "strokeWidth": 1, "strokeDash": [3, 3]}
    points = {"type": "point", "filled": True, "opacity": 0.45, "size": 22, "color": colour}
    layers = [
        {"data": diagonal, "mark": line, "encoding": {"x": x, "y": y}},
        {"mark": points, "encoding": {"x": x, "y": y, "tooltip": specs.TIP}},
    ]
    caption = f"Spearman ρ {run.value('spearman'):.4f}"
    if len(drawn) < len(run.ids):
        caption += f"; {len(drawn):,} of {len(run.ids):,} examples are drawn"
    return Figure(entry.name, caption, specs.chart(values, layers, height=210), _numbers(entry, run))


def _numbers(entry: Entry, run: Predictions) -> DataTable:
    """Return the mean prediction of the examples in each tenth of the labels' range."""
    edges = np.linspace(run.labels.min(), run.labels.max(), BINS + 1)
    bins = np.clip(np.searchsorted(edges, run.labels, side="right") - 1, 0, BINS - 1)
    rows: list[list[Cell]] = []
    for i in np.unique(bins).tolist():
        chosen = bins == i
        means = (float(x[chosen].mean()) for x in (run.labels, run.scores))
        rows.append([f"{edges[i]:.2f} to {edges[i + 1]:.2f}", int(chosen.sum()), *means])
    header = ["label", "examples", "mean label", "mean prediction"]
    return DataTable(f"Predictions of {entry.name} by label", header, rows)
