"""Names, threshold and targets of the metrics, in one place for every folder that computes, records or prints them.

They stand here and not in `evaluation`, because the console, which `evaluation` builds on, prints them too.
"""

from __future__ import annotations

MAIN_METRICS = ("accuracy", "f1", "mcc")
"""Metrics of two classes that are always shown, in this order; the others stay in run.json."""

SHOWN_METRICS = {
    "binary": MAIN_METRICS,
    "multiclass": ("accuracy", "macro_f1", "mcc"),
    "regression": ("pearson", "spearman", "mse"),
}
"""Metrics that are always shown, in this order, by form of task: two classes, more classes, a number."""

MAIN_METRIC_CHOICES = {
    "binary": ("mcc", "accuracy", "f1"),
    "multiclass": ("mcc", "accuracy", "macro_f1", "weighted_f1"),
    "regression": ("spearman", "pearson", "r2"),
}
"""Choices of `trainer.main_metric` by form of task, the default first. Of all of them higher is better."""

ALL_MAIN_METRICS = tuple(dict.fromkeys(name for names in MAIN_METRIC_CHOICES.values() for name in names))
"""Every choice of `trainer.main_metric`."""


def task_form(task_type: str, classes: int) -> str:
    """Return the form of a task: a key of `SHOWN_METRICS`.

    Args:
        task_type: `data.type`.
        classes: number of classes; not used for regression.
    """
    return "regression" if task_type == "regression" else "binary" if classes == 2 else "multiclass"


DEFAULT_THRESHOLD = 0.5
"""Of two classes label 1 is predicted from this score P(label 1) on, in every metric: no threshold is tuned on a
reported split. Of more classes the most probable one is predicted."""

EVALUATIONS_AT_TARGET = 3
"""A target is reached at the first evaluation from which so many in a row reach it, so that a lucky one does not count.
"""

SUM_TOLERANCE = 1e-3
"""The largest difference from 1 of the sum of an example's probabilities that is read from a file."""

_DISPLAY_NAMES = {
    "mcc": "MCC",
    "f1": "F1",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "auroc": "AUROC",
    "mse": "MSE",
    "mae": "MAE",
    "r2": "R²",
    "pearson": "Pearson r",
    "spearman": "Spearman ρ",
}


def display_name(metric: str) -> str:
    """Return the name of a metric as papers spell it, and a name without such a spelling unchanged."""
    return _DISPLAY_NAMES.get(metric, metric)
