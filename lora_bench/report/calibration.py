"""Calibration: reliability diagrams of the chosen settings."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.records import predictions
from lora_bench.report import specs
from lora_bench.report.content import DataTable, Figure, Grid, Paragraph, pluralise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

BINS = 10
"""Bins of a reliability diagram."""
TALLEST = 0.25
"""Height of the tallest bar of the histogram, as a share of the diagram."""


def calibration(block: Block) -> list[Content]:
    """Return reliability diagrams of the chosen settings; empty without predictions, and for a regression.

    With two classes it is the share of label 1 by its predicted probability; with more, the share of correct
    predictions by the probability of the predicted class. The runs of a setting are pooled.
    """
    if block.form == "regression":
        return []
    figures = []
    for entry in block.chosen:
        loaded = [predictions.read_if_usable(folder, block.split) for folder, _ in entry.runs]
        usable = [run for run in loaded if run is not None and run.form == block.form]
        if usable:
            is_binary = block.form == "binary"
            scores = np.concatenate([run.scores if is_binary else run.scores.max(axis=1) for run in usable])
            outcomes = np.concatenate([run.labels if is_binary else run.correct for run in usable])
            figures.append(_figure(entry, block.split, scores, outcomes, _NAMES[block.form]))
    if not figures:
        return []
    note = (
        "On the diagonal a predicted probability is the observed share; below it the model is overconfident. "
        f"Bars: how often each probability is predicted. {block.chosen_note}"
    )
    return [Paragraph(note.strip()), Grid(figures, "small")]


@dataclass(frozen=True)
class _Names:
    """The words of a reliability diagram."""

    score: str
    """Title of the horizontal axis."""
    mean: str
    """The mean of the scores in a bin."""
    outcome: str
    """The outcome whose share is drawn."""


_NAMES = {
    "binary": _Names("P(label 1)", "mean P", "label 1"),
    "multiclass": _Names("confidence", "mean confidence", "correct predictions"),
}


def _figure(entry: Entry, split: str, scores: NDArray[np.float64], outcomes: NDArray[Any], names: _Names) -> Figure:
    """Return the reliability diagram of one entry.

    Args:
        entry: its setting.
        split: the reported split.
        scores: (N,) predicted probabilities.
        outcomes: (N,) 1 where what they are about came true, else 0.
        names: the words of the diagram.
    """
    bins = np.minimum((scores * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = np.flatnonzero(counts)
    mean_scores = (np.bincount(bins, weights=scores, minlength=BINS)[filled] / counts[filled]).tolist()
    label_shares = (np.bincount(bins, weights=outcomes, minlength=BINS)[filled] / counts[filled]).tolist()
    values, rows = [], list[list["Cell"]]()
    for i, p, share in zip(filled.tolist(), mean_scores, label_shares, strict=True):
        count = int(counts[i])
        between = f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}"
        tip = f"{names.mean} {p:.3f}: {names.outcome} in {share:.3f} of {pluralise(count, 'prediction')}"
        bar_tip = f"{pluralise(count, 'prediction')} from {between}"
        height = TALLEST * count / int(counts.max())
        values.append({"x": p, "y": share, "tip": tip, "from": i / BINS, "to": (i + 1) / BINS, "height": height})
        values[-1] |= {"bar_tip": bar_tip}
        rows.append([between, count, p, share])
    eces = [record["metrics"].get(f"{split}/ece") for _, record in entry.runs]
    numbers = [value for value in eces if isinstance(value, int | float)]
    caption = f"ECE {fmean(numbers):.4f}" if numbers else ""
    caption += f", mean of {len(numbers)} runs" if len(numbers) > 1 else ""
    data = DataTable(
        f"Calibration of {entry.name}", [names.score, "predictions", names.mean, f"share of {names.outcome}"], rows
    )
    return Figure(entry.name, caption, _diagram(values, entry.series or 0, names), data)


def _diagram(values: list[dict[str, object]], series: int, names: _Names) -> specs.Spec:
    """Return the specification of a reliability diagram."""
    unit: dict[str, Any] = {"scale": {"domain": [0, 1], "nice": False, "padding": 0}, "axis": {"values": [0, 0.5, 1]}}
    x = specs.quantity("x", names.score, **unit)
    y = specs.quantity("y", f"share of {names.outcome}", **unit)
    colour = f"var(--s{series})"
    diagonal = {"values": [{"x": 0, "y": 0}, {"x": 1, "y": 1}]}
    bars = {"x": {**x, "field": "from"}, "x2": {"field": "to"}, "y": {**y, "field": "height"}, "y2": {"datum": 0}}
    return specs.chart(
        values,
        [
            {
                "mark": {"type": "rect", "fill": "var(--rule)", "stroke": "var(--paper)"},
                "encoding": {**bars, "tooltip": {"field": "bar_tip", "type": "nominal"}},
            },
            {
                "data": diagonal,
                "mark": {"type": "line", "stroke": "var(--soft)", "strokeWidth": 1, "strokeDash": [3, 3]},
                "encoding": {"x": x, "y": y},
            },
            {"mark": {"type": "line", "stroke": colour}, "encoding": {"x": x, "y": y}},
            {
                "mark": {"type": "point", "filled": True, "opacity": 1, "size": 70, "color": colour},
                "encoding": {"x": x, "y": y, "tooltip": specs.TIP},
            },
        ],
        height=210,
    )
