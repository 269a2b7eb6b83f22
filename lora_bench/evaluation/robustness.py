"""Robustness metrics: how predictions change when texts are perturbed, from scores before and after.

A split's metrics are `<transform>/<name>` for each transform, and `perturbed/<name>` over all that keep labels:

    changed           share of rows that the transform changes
    accuracy f1 mcc   of the whole split, unchanged rows included: mean over seeds
    …_worst           the lowest over seeds (below `perturbed`: over seeds and transforms)
    …_drop            (clean - perturbed) / clean
    flip_rate         share of changed rows whose predicted class changes: mean over seeds (and transforms)
    mean_change       in regression, in place of flip_rate: mean absolute change of the predictions of changed rows
    attack_success    share of changed, correctly predicted rows that some seed (or transform) makes wrong
    order_consistency share of pairs whose prediction does not depend on the order of their texts (only `perturbed`)

More than two classes have macro_f1 in place of f1. Regression has pearson and spearman, and neither of the last two:
no prediction is exactly right. A transform that changes labels has changed, accuracy (with worst and drop) and
attack_success. They are computed over the changed rows alone and with the new labels, so that a prediction that does
not change is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.config.metric_names import MAIN_METRIC_CHOICES, SHOWN_METRICS
from lora_bench.evaluation.metrics import score
from lora_bench.evaluation.scores import form_of, predict_labels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.evaluation.scores import Labels

Values = dict[str, float | None]


@dataclass(frozen=True)
class Trial:
    """The M rows that one transform changed with one seed."""

    transform: str
    keeps_label: bool
    rows: NDArray[np.int64]  # (M,) positions in the split
    labels: Labels  # (M,) after the change
    scores: NDArray[np.float64]  # (M,) or (M, C) after the change


def robustness(scores: NDArray[np.float64], labels: Labels, trials: Sequence[Trial]) -> Values:
    """Return all robustness metrics of one split.

    Args:
        scores: of the unperturbed split: (N,) P(label 1) of two classes, (N, C) probabilities of more classes, or (N,)
            predicted numbers.
        labels: (N,) class numbers, or numbers to predict.
        trials: grouped by transform. In regression all keep labels.

    Returns:
        The values by `<transform>/<name>` and `perturbed/<name>`; None where no row was changed, and for ratios with a
        denominator that is not above 0. No `perturbed/…` without a transform that keeps labels. Empty without trials.

    Raises:
        DivergedError: a score is not a finite number.
    """
    form = form_of(scores, labels)
    names = [name for name in SHOWN_METRICS[form] if name in MAIN_METRIC_CHOICES[form]]
    clean = {name: _require_value(value) for name, value in score(scores, labels, {}).items() if name in names}
    has_classes = form != "regression"
    correct = predict_labels(scores) == labels if has_classes else np.zeros(len(labels), bool)
    metrics: Values = {}
    kept_by_transform: list[Values] = []
    attacked, fooled = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for (name, keeps_label), group in groupby(trials, key=lambda trial: (trial.transform, trial.keeps_label)):
        trials_of_transform = list(group)
        values: Values = {"changed": float(np.mean([len(trial.rows) for trial in trials_of_transform]) / len(labels))}
        if keeps_label:
            values |= _label_keeping_metrics(trials_of_transform, scores, labels, clean)
            kept_by_transform.append(values)
        else:
            values |= _label_changing_metrics(trials_of_transform, correct)
        if has_classes:
            attacked_now, fooled_now = _attacked_rows(trials_of_transform, correct)
            values["attack_success"] = _ratio(fooled_now.sum(), attacked_now.sum())
            if keeps_label:
                attacked |= attacked_now
                fooled |= fooled_now
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
    if kept_by_transform:
        overall = _mean_over_transforms(kept_by_transform, clean)
        if has_classes:
            overall["attack_success"] = _ratio(fooled.sum(), attacked.sum())
        if metrics.get("order/flip_rate") is not None:
            overall["order_consistency"] = 1 - _require_value(metrics["order/flip_rate"])
        metrics |= {f"perturbed/{key}": value for key, value in overall.items()}
    return metrics


def _attacked_rows(trials: Sequence[Trial], correct: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return two (N,) masks: correctly predicted rows that a trial changes, and those of them that it makes wrong."""
    changed_rows, misled = np.zeros(len(correct), bool), np.zeros(len(correct), bool)
    for trial in trials:
        changed_rows[trial.rows] = True
        if len(trial.rows):
            misled[trial.rows] |= predict_labels(trial.scores) != trial.labels
    return changed_rows & correct, misled & changed_rows & correct


def _label_keeping_metrics(
    trials: Sequence[Trial], scores: NDArray[np.float64], labels: Labels, clean: Mapping[str, float]
) -> Values:
    """Return the metrics of a transform that keeps labels: those of the whole split, and the change of predictions.

    That change is the mean over the trials that change rows; None if none does.

    Args:
        trials: of the transform, at least one.
        scores: (N,) or (N, C) of the unperturbed split.
        labels: (N,).
        clean: the metrics of the unperturbed split by name.
    """
    has_classes = form_of(scores, labels) != "regression"
    metrics_by_trial, changes = [], []
    for trial in trials:
        perturbed = scores.copy()
        if len(trial.rows):
            perturbed[trial.rows] = trial.scores
            before, after = scores[trial.rows], trial.scores
            flips = predict_labels(after) != predict_labels(before) if has_classes else np.abs(after - before)
            changes.append(float(flips.mean()))
        metrics_by_trial.append(score(perturbed, labels, {}))
    by_name = {name: [_require_value(metrics[name]) for metrics in metrics_by_trial] for name in clean}
    values: Values = {name: float(np.mean(numbers)) for name, numbers in by_name.items()}
    values |= {f"{name}_worst": min(numbers) for name, numbers in by_name.items()}
    change = float(np.mean(changes)) if changes else None
    return values | _drops(values, clean) | {"flip_rate" if has_classes else "mean_change": change}


def _label_changing_metrics(trials: Sequence[Trial], correct: NDArray[np.bool_]) -> Values:
    """Return the metrics of a transform that changes labels: accuracy on the rows that it changes, before and after.

    Trials without changed rows are left out; all values are None if no trial has any.

    Args:
        trials: of the transform.
        correct: (N,) True where the unperturbed row is predicted correctly.
    """
    trials = [trial for trial in trials if len(trial.rows)]
    if not trials:
        return dict.fromkeys(("accuracy", "accuracy_worst", "accuracy_drop"))
    accuracies = [float((predict_labels(trial.scores) == trial.labels).mean()) for trial in trials]
    before = float(np.mean([correct[trial.rows].mean() for trial in trials]))
    values: Values = {"accuracy": float(np.mean(accuracies)), "accuracy_worst": min(accuracies)}
    return values | {"accuracy_drop": _ratio(before - float(np.mean(accuracies)), before)}


def _mean_over_transforms(by_transform: Sequence[Values], clean: Mapping[str, float]) -> Values:
    """Return the means over the transforms that keep labels, with equal weights; `…_worst` is the lowest of all.

    Transforms that change no row are left out of the change of predictions, which is None if none changes any.
    """
    values: Values = {}
    for name in ("changed", *clean):
        values[name] = float(np.mean([_require_value(metrics[name]) for metrics in by_transform]))
    values |= {
        f"{name}_worst": min(_require_value(metrics[f"{name}_worst"]) for metrics in by_transform) for name in clean
    }
    change = "flip_rate" if "flip_rate" in by_transform[0] else "mean_change"
    changes = [_require_value(metrics[change]) for metrics in by_transform if metrics[change] is not None]
    return values | _drops(values, clean) | {change: float(np.mean(changes)) if changes else None}


def _drops(values: Values, clean: Mapping[str, float]) -> Values:
    """Return the relative loss of each main metric: (clean - perturbed) / clean; None where `clean` is not above 0."""
    return {f"{name}_drop": _ratio(before - _require_value(values[name]), before) for name, before in clean.items()}


def _ratio(numerator: float, denominator: float) -> float | None:
    """Return a ratio; None if the denominator is not above 0."""
    return float(numerator / denominator) if denominator > 0 else None


def _require_value(value: float | None) -> float:
    """Return a value that cannot be None here."""
    assert value is not None
    return value
