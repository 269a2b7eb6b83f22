"""Binary metrics from scores P(label 1): torchmetrics' where they suit, our own where they do not.

Three of torchmetrics' conventions do not suit: its Matthews correlation of a constant predictor is not 0, its binary
calibration error bins P(label 1) instead of the confidence in the predicted label, and it accepts NaN scores. Those
two metrics are computed here, and scores are checked first. torchmetrics also predicts label 1 above its threshold,
where we predict it from the threshold on: a score of exactly 0.5 must not count as 1 in one metric and as 0 in another.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD
from lora_bench.errors import Code, DivergedError, UserError, nearest
from lora_bench.evaluation.confusion import compute_metric, confusion_counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from lora_bench.config.schema import Metric

CALIBRATION_BINS = 15
"""Bins of the expected calibration error."""
_BELOW_THRESHOLD = math.nextafter(DEFAULT_THRESHOLD, 0.0)
SMALLEST = 1e-15  # a score of exactly 0 or 1 costs 34.5 nats, not infinity
_TORCHMETRICS = {
    "accuracy": "BinaryAccuracy",
    "f1": "BinaryF1Score",
    "precision": "BinaryPrecision",
    "recall": "BinaryRecall",
    "auroc": "BinaryAUROC",
}


def score(
    scores: NDArray[np.float64], labels: NDArray[np.int64], extra: Mapping[str, Metric]
) -> dict[str, float | None]:
    """Return all metrics of one split.

    Args:
        scores: (N,) P(label 1).
        labels: (N,) 0 or 1.
        extra: metrics of torchmetrics to add to the standard ones, by the name to report.

    Returns:
        accuracy, f1, mcc, precision, recall, auroc, nll, ece, brier and the extra ones. Label 1 is predicted from a
        score of `DEFAULT_THRESHOLD` on. If only one label occurs, auroc is None, and so is an extra metric without a
        value.

    Raises:
        DivergedError: a score is not a finite number.
    """
    require_finite(scores)
    predicted = scores >= DEFAULT_THRESHOLD
    import torch  # late: a bad record is refused without it

    p, y = torch.from_numpy(scores), torch.from_numpy(labels)
    values = {name: _compute(class_name, p, y) for name, class_name in _TORCHMETRICS.items()}
    if labels.min() == labels.max():
        values["auroc"] = None
    values["mcc"] = float(compute_metric(confusion_counts(labels, predicted)))
    likelihood = np.where(labels == 1, scores, 1 - scores)
    values["nll"] = float(-np.log(np.clip(likelihood, SMALLEST, 1.0)).mean())
    values["brier"] = float(((scores - labels) ** 2).mean())
    values["ece"] = expected_calibration_error(scores, labels)
    for name, metric in extra.items():
        values[name] = _compute(metric.torchmetric, p, y)
    return values


def mean_metrics(metric_sets: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each metric over several tasks, splits or members; None if it is None in one of them.

    All sets have the metrics of the first; others are left out. At least one set is given.
    """
    means: dict[str, float | None] = {}
    for name in metric_sets[0]:
        values = [metrics[name] for metrics in metric_sets]
        numbers = [value for value in values if value is not None]
        means[name] = float(np.mean(numbers)) if len(numbers) == len(values) else None
    return means


def require_finite(scores: NDArray[np.float64]) -> None:
    """Refuse scores that are not all finite numbers.

    Raises:
        DivergedError: a score is NaN or infinite.
    """
    if not np.isfinite(scores).all():
        raise DivergedError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite numbers")


def expected_calibration_error(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the ECE: over equal-width bins of the confidence in the predicted label (Guo et al. 2017, eq. 3).

    The CALIBRATION_BINS bins divide [0, 1], so that confidences, at least 0.5, fall into the upper half of them.

    Args:
        scores: (N,) P(label 1).
        labels: (N,) 0 or 1.
    """
    confidence = np.maximum(scores, 1 - scores)
    correct = (scores >= DEFAULT_THRESHOLD) == (labels == 1)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def check_metrics(extra: Mapping[str, Metric]) -> None:
    """Refuse extra metrics that torchmetrics does not have, or that are not a single number, before training begins.

    Raises:
        UserError: a metric is not a binary metric of torchmetrics.classification, or needs arguments; its key is named.
    """
    if not extra:
        return
    import torch
    import torchmetrics

    classes = vars(torchmetrics.classification).items()
    class_names = [
        name
        for name, metric_class in classes
        if name.startswith("Binary") and issubclass(metric_class, torchmetrics.Metric)
    ]
    for name, metric in extra.items():
        if metric.torchmetric not in class_names:
            key = f"metric.{name}.torchmetric"
            reason = "is no binary metric of torchmetrics.classification"
            raise UserError(
                reason,
                key=key,
                value=metric.torchmetric,
                remedy=nearest(metric.torchmetric, class_names),
                code=Code.UNKNOWN_CHOICE,
            )
        try:
            _compute(metric.torchmetric, torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))
        except (TypeError, ValueError):
            reason = "needs settings of its own, or is not a single number"
            remedy = "Take one such as BinarySpecificity or BinaryAveragePrecision."
            key = f"metric.{name}.torchmetric"
            raise UserError(reason, key=key, value=metric.torchmetric, remedy=remedy, code=Code.UNSUPPORTED) from None


def _compute(class_name: str, scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the value of a class of torchmetrics.classification; None if it is not a finite number.

    Its threshold, if it has one, is set so that a score of exactly `DEFAULT_THRESHOLD` counts as label 1. Its warnings
    are discarded.
    """
    import torchmetrics  # takes more than a second: training begins without it

    metric: torchmetrics.Metric = getattr(torchmetrics.classification, class_name)()
    if hasattr(metric, "threshold"):
        metric.threshold = _BELOW_THRESHOLD
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that only one label occurs: the data's own warnings say so
        metric.update(scores, labels)
        value = float(metric.compute())
    return value if math.isfinite(value) else None
