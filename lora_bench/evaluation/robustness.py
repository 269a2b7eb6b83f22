"""Robustness metrics: how predictions change when texts are perturbed, from scores before and after.

A split's metrics are `<transform>/<name>` for each transform, and `perturbed/<name>` over all that keep labels:

    changed           share of rows that the transform changes
    accuracy f1 mcc   of the whole split, unchanged rows included: mean over seeds
    …_worst           the lowest over seeds (below `perturbed`: over seeds and transforms)
    …_drop            (clean - perturbed) / clean
    flip_rate         share of changed rows whose predicted label changes: mean over seeds (and transforms)
    attack_success    share of changed, correctly predicted rows that some seed (or transform) makes wrong
    order_consistency share of pairs whose prediction does not depend on the order of their texts (only `perturbed`)

A transform that changes labels has changed, accuracy (with worst and drop) and attack_success. They are computed over
the changed rows alone and with the new labels, so that a prediction that does not change is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD, MAIN_METRICS
from lora_bench.evaluation.metrics import score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Values = dict[str, float | None]


@dataclass(frozen=True)
class Trial:
    """The M rows that one transform changed with one seed."""

    transform: str
    keeps_label: bool
    rows: NDArray[np.int64]  # (M,) positions in the split
    labels: NDArray[np.int64]  # (M,) after the change
    scores: NDArray[np.float64]  # (M,) P(label 1) after the change


def robustness(scores: NDArray[np.float64], labels: NDArray[np.int64], trials: Sequence[Trial]) -> Values:
    """Return all robustness metrics of one split.

    Args:
        scores: (N,) P(label 1) of the unperturbed split.
        labels: (N,) 0 or 1.
        trials: grouped by transform.

    Returns:
        The values by `<transform>/<name>` and `perturbed/<name>`; None where no row was changed, and for ratios with a
        denominator that is not above 0. No `perturbed/…` without a transform that keeps labels. Empty without trials.

    Raises:
        DivergedError: a score is not a finite number.
    """
    clean = score(scores, labels, {})
    correct = (scores >= DEFAULT_THRESHOLD) == (labels == 1)
    metrics: Values = {}
    kept_by_transform: list[Values] = []
    attacked, fooled = np.zeros(len(labels), bool), np.zeros(len(labels), bool)
    for (name, keeps_label), group in groupby(trials, key=lambda trial: (trial.transform, trial.keeps_label)):
        trials_of_transform = list(group)
        attacked_now, fooled_now = _attacked_rows(trials_of_transform, correct)
        values: Values = {"changed": float(np.mean([len(trial.rows) for trial in trials_of_transform]) / len(labels))}
        if keeps_label:
            values |= _label_keeping_metrics(trials_of_transform, scores, labels, clean)
            kept_by_transform.append(values)
            attacked |= attacked_now
            fooled |= fooled_now
        else:
            values |= _label_changing_metrics(trials_of_transform, correct)
        values["attack_success"] = _ratio(fooled_now.sum(), attacked_now.sum())
        metrics |= {f"{name}/{key}": value for key, value in values.items()}
    if kept_by_transform:
        overall = _mean_over_transforms(kept_by_transform, clean)
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
        misled[trial.rows] |= (trial.scores >= DEFAULT_THRESHOLD) != (trial.labels == 1)
    return changed_rows & correct, misled & changed_rows & correct


def _label_keeping_metrics(
    trials: Sequence[Trial], scores: NDArray[np.float64], labels: NDArray[np.int64], clean: Values
) -> Values:
    """Return the metrics of a transform that keeps labels: those of the whole split, and the flip rate.

    The flip rate is the mean over the trials that change rows; None if none does.

    Args:
        trials: of the transform, at least one.
        scores: (N,) P(label 1) of the unperturbed split.
        labels: (N,) 0 or 1.
        clean: the metrics of the unperturbed split.
    """
    metrics_by_trial, flips = [], []
    for trial in trials:
        perturbed = scores.copy()
        perturbed[trial.rows] = trial.scores
        metrics_by_trial.append(score(perturbed, labels, {}))
        if len(trial.rows):
            flips.append(float(((perturbed >= DEFAULT_THRESHOLD) != (scores >= DEFAULT_THRESHOLD))[trial.rows].mean()))
    values: Values = {
        name: float(np.mean([_require_value(metrics[name]) for metrics in metrics_by_trial])) for name in MAIN_METRICS
    }
    values |= {
        f"{name}_worst": min(_require_value(metrics[name]) for metrics in metrics_by_trial) for name in MAIN_METRICS
    }
    return values | _drops(values, clean) | {"flip_rate": float(np.mean(flips)) if flips else None}


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
    accuracies = [float(((trial.scores >= DEFAULT_THRESHOLD) == (trial.labels == 1)).mean()) for trial in trials]
    before = float(np.mean([correct[trial.rows].mean() for trial in trials]))
    values: Values = {"accuracy": float(np.mean(accuracies)), "accuracy_worst": min(accuracies)}
    return values | {"accuracy_drop": _ratio(before - float(np.mean(accuracies)), before)}


def _mean_over_transforms(by_transform: Sequence[Values], clean: Values) -> Values:
    """Return the means over the transforms that keep labels, with equal weights; `…_worst` is the lowest of all.

    Transforms that change no row are left out of the flip rate, which is None if none changes any.
    """
    values: Values = {}
    for name in ("changed", *MAIN_METRICS):
        values[name] = float(np.mean([_require_value(metrics[name]) for metrics in by_transform]))
    values |= {
        f"{name}_worst": min(_require_value(metrics[f"{name}_worst"]) for metrics in by_transform)
        for name in MAIN_METRICS
    }
    flips = [_require_value(metrics["flip_rate"]) for metrics in by_transform if metrics["flip_rate"] is not None]
    return values | _drops(values, clean) | {"flip_rate": float(np.mean(flips)) if flips else None}


def _drops(values: Values, clean: Values) -> Values:
    """Return the relative loss of each main metric: (clean - perturbed) / clean; None where `clean` is not above 0."""
    before = {name: _require_value(clean[name]) for name in MAIN_METRICS}
    return {f"{name}_drop": _ratio(before[name] - _require_value(values[name]), before[name]) for name in MAIN_METRICS}


def _ratio(numerator: float, denominator: float) -> float | None:
    """Return a ratio; None if the denominator is not above 0."""
    return float(numerator / denominator) if denominator > 0 else None


def _require_value(value: float | None) -> float:
    """Return a value that cannot be None here."""
    assert value is not None
    return value
