"""Published results on QQP beside ours, with the MCC that follows from accuracy and F1.

On a set of known size and number of positives, accuracy and F1 determine the confusion counts, and so MCC. Published
results are shown only beside runs that were scored on that set, GLUE's QQP dev set.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.analysis.table import Column, Row, Table
from lora_bench.config.metric_names import MAIN_METRICS
from lora_bench.evaluation.confusion import compute_metric

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_COLUMNS = ("published", *MAIN_METRICS, "source")


def confusion_from(accuracy: float, f1: float, examples: int, positives: int) -> NDArray[np.float64] | None:
    """Return the confusion counts (tp, fp, fn, tn) that accuracy and F1 determine; None if one would be negative.

    F1 = 2 TP / (2 TP + errors) and errors = (1 - accuracy) examples give TP; positives give the other three. The counts
    are whole numbers only if both metrics are exact. One mistake is allowed for rounding.

    Args:
        accuracy: a fraction.
        f1: of the positive class, a fraction.
        examples: size of the set.
        positives: examples with label 1.
    """
    errors = (1 - accuracy) * examples
    tp = errors * f1 / (2 * (1 - f1)) if f1 < 1 else float(positives)
    fn = positives - tp
    counts = np.array([tp, errors - fn, fn, examples - positives - errors + fn])
    return np.maximum(counts, 0.0) if counts.min() > -1 else None


def is_possible(metrics: Sequence[float], examples: int, positives: int) -> bool:
    """Return whether some whole counts give the exact accuracy, F1 and MCC, to six decimals."""
    counts = confusion_from(metrics[0], metrics[1], examples, positives)
    values = None if counts is None else [compute_metric(counts.round(), name) for name in MAIN_METRICS]
    return values is not None and bool(np.allclose(values, metrics, rtol=0, atol=1e-6))


def load_published() -> dict[str, Any]:
    """Return the published `results`, with the size (`examples`) and `positives` of their set."""
    import yaml

    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
    return content


def derived_mcc(result: dict[str, Any], examples: int, positives: int) -> float | None:
    """Return the MCC that follows from a published accuracy and F1 in per cent; None if they contradict each other."""
    counts = confusion_from(result["accuracy"] / 100, result["f1"] / 100, examples, positives)
    return None if counts is None else float(compute_metric(counts))


def add_published_results(table: Table) -> Table:
    """Return the table with published results beside it, if some of its runs were scored on GLUE's QQP dev set.

    Its notes say which rows are not comparable with them, and which runs have metrics that are impossible on that set.
    """
    content = load_published()
    size = (content["examples"], content["positives"])
    on_dev = [row for row in table.rows if _validation_size(table, row) == size]
    if not on_dev:
        note = f"no published results are shown: they are of GLUE's QQP dev set ({size[0]:,} pairs), and no run here is"
        return replace(table, notes=[*table.notes, note])
    rows = [Row(_cells(result, *size), {}, 1, []) for result in content["results"] if result["split"] == "dev"]
    columns = [Column(name, "key" if name in ("published", "source") else "text") for name in _COLUMNS]
    notes = ["published: accuracy and F1 in per cent on GLUE's QQP dev set, often of the best epoch on it; MCC derived"]
    if len(on_dev) < len(table.rows):
        notes.append(f"{len(table.rows) - len(on_dev)} rows are of other data: not comparable with published results")
    for folder in (folder for row in on_dev for folder in row.folders):
        recorded = table.records[folder]["metrics"]
        metrics = [recorded.get(f"validation/{name}") for name in MAIN_METRICS]
        if all(isinstance(value, int | float) for value in metrics) and not is_possible(metrics, *size):
            notes.append(f"impossible on that set: accuracy, F1 and MCC of {folder}")
    return replace(table, published=Table(columns, rows), notes=table.notes + notes)


def _cells(result: dict[str, Any], examples: int, positives: int) -> dict[str, str]:
    """Return the cells of a published result by column."""
    cells = {"published": f"{result['model']}, {result['method']}", "source": result["source"]}
    cells |= {name: f"{result[name]:.2f}" for name in ("accuracy", "f1") if name in result}
    if "accuracy" in result and "f1" in result:
        mcc = derived_mcc(result, examples, positives)
        cells |= {} if mcc is None else {"mcc": f"{mcc:.3f}"}
    return cells


def _validation_size(table: Table, row: Row) -> tuple[Any, Any]:
    """Return the number of examples and of positives of a row's validation split; None where it is not recorded."""
    data = table.records[row.folders[0]]["data"]
    rows, positives = (data.get(name) for name in ("rows", "positives"))
    if data.get("source") is None or not isinstance(rows, dict) or not isinstance(positives, dict):
        return None, None
    return rows.get("validation"), positives.get("validation")
