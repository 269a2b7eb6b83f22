"""The metrics that choose settings and are tested, and the influence of each example on them, for all forms of task.

The name of the metric tells the form where it matters: of two classes, MCC and accuracy are the same by the formulas
for two and for more classes, and those for two are used. Needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.config.metric_names import MAIN_METRIC_CHOICES
from lora_bench.evaluation import confusion, regression

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


def is_of_numbers(measure: str) -> bool:
    """Return whether a metric is one of regression."""
    return measure in MAIN_METRIC_CHOICES["regression"]


def is_of_two_classes(measure: str, *classes: NDArray[Any]) -> bool:
    """Return whether a metric of labels and predictions can be computed from binary confusion counts.

    Args:
        measure: the name of the metric.
        classes: labels and predictions, of any shape.
    """
    return measure in MAIN_METRIC_CHOICES["binary"] and all(x.size == 0 or x.max() <= 1 for x in classes)


def compute(labels: ArrayLike, predicted: ArrayLike, measure: str) -> Floats:
    """Return a metric of predictions: (...).

    Args:
        labels: (N,) classes 0, 1, …, or numbers.
        predicted: (..., N) predicted classes or numbers.
        measure: one of `ALL_MAIN_METRICS`.
    """
    y, p = np.asarray(labels), np.asarray(predicted)
    if is_of_numbers(measure):
        return regression.compute_metric(y, p, measure)
    if is_of_two_classes(measure, y, p):
        return confusion.compute_metric(confusion.confusion_counts(y, p), measure)
    return confusion.compute_class_metric(confusion.class_totals(y, p), measure)


def pseudo_values(labels: ArrayLike, predicted: ArrayLike, measure: str) -> Floats:
    """Return the metric of each model plus the influence of each example on it, so that their mean is the metric.

    Args:
        labels: (N,) classes 0, 1, …, or numbers.
        predicted: (S, N) predicted classes or numbers of S models.
        measure: one of `ALL_MAIN_METRICS`.

    Returns:
        (S, N).
    """
    y, p = np.asarray(labels), np.asarray(predicted)
    if is_of_numbers(measure):
        return regression.compute_metric(y, p, measure)[:, None] + regression.influence(y, p, measure)
    if is_of_two_classes(measure, y, p):
        y, p = y.astype(bool, copy=False), p.astype(bool, copy=False)
        counts = confusion.confusion_counts(y, p)  # (S, 4)
        cell = np.where(p, 0, 2) + np.where(y, 0, 1)  # (S, N): tp 0, fp 1, fn 2, tn 3
        added = np.take_along_axis(confusion.influence(counts, measure), cell, axis=1)  # (S, N)
        return confusion.compute_metric(counts, measure)[:, None] + added
    totals = confusion.class_totals(y, p)  # (S, 3, k)
    by_cell = confusion.class_influence(totals, measure)  # (S, k, k)
    added = np.asarray(by_cell[np.arange(len(p))[:, None], y, p])  # (S, N)
    return confusion.compute_class_metric(totals, measure)[:, None] + added
