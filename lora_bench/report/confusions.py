"""Confusions: which classes of a task with three or more are predicted for which, and the F1 of each class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.console.format import to_single_line
from lora_bench.records import predictions
from lora_bench.report import specs
from lora_bench.report.content import DataTable, Figure, Grid, Paragraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

MATRICES = 4
"""Settings whose confusion matrix is drawn."""
CLASSES = 20
"""Classes of a matrix; of more, those with the most confusions are drawn."""
TABLE_ROWS = 100
"""Rows of the table of classes."""
MAX_NAME = 24
"""Characters of a class name on an axis."""


def confusions(block: Block) -> list[Content]:
    """Return confusion matrices of the chosen settings and the F1 of each class; empty for other forms of task.

    The runs of a setting are pooled.
    """
    if block.form != "multiclass":
        return []
    pooled = [(entry, matrix) for entry in block.chosen if (matrix := _pool(entry, block.split)) is not None]
    pooled = [(entry, matrix) for entry, matrix in pooled if matrix.shape == pooled[0][1].shape]
    if not pooled:
        return []
    names = class_names(block.label_names, len(pooled[0][1]))
    figures = [_figure(entry, matrix, names) for entry, matrix in pooled[:MATRICES]]
    note = f"Rows: the label. Columns: the prediction. A cell is a share of its row. {block.chosen_note}".strip()
    if len(pooled) > MATRICES:
        note += f" The first {MATRICES} of {len(pooled)} settings are drawn."
    return [Paragraph(note), Grid(figures), *_table(pooled, names)]


def class_names(names: Sequence[str] | None, classes: int) -> list[str]:
    """Return the names of the classes, or their numbers where names are not recorded for each; all of them unique."""
    if names is None or len(names) != classes:
        return [str(i) for i in range(classes)]
    short = [to_single_line(name)[:MAX_NAME] for name in names]
    return [name if short.count(name) == 1 else f"{name[: MAX_NAME - 4]} ({i})" for i, name in enumerate(short)]


def _pool(entry: Entry, split: str) -> NDArray[np.int64] | None:
    """Return the confusion matrix (k, k) summed over an entry's runs; None without predictions of classes."""
    loaded = [predictions.read_if_usable(folder, split) for folder, _ in entry.runs]
    usable = [run for run in loaded if run is not None and run.form == "multiclass"]
    matrices = [run.confusion_matrix() for run in usable]
    matrices = [matrix for matrix in matrices if matrix.shape == matrices[0].shape]
    return np.sum(matrices, axis=0) if matrices else None


def _figure(entry: Entry, matrix: NDArray[np.int64], names: Sequence[str]) -> Figure:
    """Return the confusion matrix of one entry, of its most confused classes if there are many."""
    confused = matrix - np.diag(np.diag(matrix))
    by_confusions = np.argsort(-(confused.sum(0) + confused.sum(1)), kind="stable")[:CLASSES]
    drawn = sorted(by_confusions.tolist())
    values: list[dict[str, Any]] = []
    for i in drawn:
        total = int(matrix[i].sum())
        for j in drawn:
            share = matrix[i, j] / total if total else 0.0
            tip = f"label {names[i]}, predicted {names[j]}\n{matrix[i, j]:,} of {total:,} predictions, {share:.1%}"
            value = {"row": names[i], "column": names[j], "text": f"{100 * share:.0f}" if matrix[i, j] else ""}
            values.append(value | {"share": share, "chosen": False, "tip": tip})
    labels = [names[i] for i in drawn]
    caption = "per cent of the label's examples"
    if len(drawn) < len(names):
        caption += f"; {len(drawn)} of {len(names)} classes, those with the most confusions"
    rows: list[list[Cell]] = [[names[i], *(int(matrix[i, j]) for j in drawn)] for i in drawn]
    numbers = DataTable(f"Predictions of {entry.name} by label and predicted class", ["label", *labels], rows)
    is_wide = len("".join(labels)) > 40
    spec = specs.heat_map(values, labels, labels, ("prediction", "label"), angle=-50 if is_wide else 0)
    return Figure(entry.name, caption, spec, numbers)


def _table(pooled: Sequence[tuple[Entry, NDArray[np.int64]]], names: Sequence[str]) -> list[Content]:
    """Return the table of the F1 of each class, the classes with the lowest F1 of the first setting first."""
    f1 = np.stack([_class_f1(matrix) for _, matrix in pooled])  # (settings, k)
    order = np.argsort(f1[0], kind="stable")[:TABLE_ROWS].tolist()
    runs = [max(1, len(entry.runs)) for entry, _ in pooled]
    examples = pooled[0][1].sum(1) / runs[0]
    rows: list[list[Cell]] = [[names[i], f"{examples[i]:,.0f}", *f1[:, i].tolist()] for i in order]
    header = ["class", "examples", *(entry.name for entry, _ in pooled)]
    contents: list[Content] = [DataTable("F1 of each class", header, rows)]
    if len(order) < len(names):
        contents.append(Paragraph(f"The {len(order)} of {len(names)} classes with the lowest F1 are listed."))
    return contents


def _class_f1(matrix: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the F1 of each class (k,); 0 for a class that is neither a label nor predicted."""
    size = matrix.sum(0) + matrix.sum(1)
    return np.asarray(2 * np.diag(matrix) / np.maximum(size, 1))
