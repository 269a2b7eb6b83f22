"""Binary metrics from scores P(label 1): torchmetrics' where they are right, ours where they are not.

torchmetrics' Matthews correlation of a constant predictor is not 0, its binary calibration error bins P(label 1)
instead of the confidence in the predicted label, and NaN scores pass through it silently; so the scores are checked
first and those two are stated here. It also predicts 1 above its threshold where we predict 1 from 0.5 on: a score of
exactly 0.5 must not count as 1 in one metric and as 0 in the next.
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
    """All metrics of one split.

    Args:
        scores: (N,) P(label 1).
        labels: (N,) 0 or 1.
        extra: metrics of torchmetrics besides the standard ones, by the name to report.

    Returns:
        accuracy, f1, mcc, precision, recall, auroc, nll, ece, brier and the extra ones; a label is predicted 1 from a
        score of 0.5 on; auroc, and an extra metric without a value, are None where only one label occurs.

    Raises:
        DivergedError: a score is not a finite number.
    """
    require_finite(scores)
    predicted = scores >= DEFAULT_THRESHOLD
    import torch  # late: a bad record is refused without it

    p, y = torch.from_numpy(scores), torch.from_numpy(labels)
    values = {name: _compute(kind, p, y) for name, kind in _TORCHMETRICS.items()}
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


def mean_metrics(of_each: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """The mean of each metric over several tasks, splits or members; None where one of them has none."""
    found: dict[str, float | None] = {}
    for name in of_each[0]:
        values = [each[name] for each in of_each]
        numbers = [value for value in values if value is not None]
        found[name] = float(np.mean(numbers)) if len(numbers) == len(values) else None
    return found


def require_finite(scores: NDArray[np.float64]) -> None:
    """Refuse scores of which one is not a finite number."""
    if not np.isfinite(scores).all():
        raise DivergedError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite numbers")


def expected_calibration_error(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """ECE over equal-width bins of the confidence in the predicted label (Guo et al. 2017, eq. 3)."""
    confidence = np.maximum(scores, 1 - scores)
    correct = (scores >= DEFAULT_THRESHOLD) == (labels == 1)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(scores))


def check_metrics(extra: Mapping[str, Metric]) -> None:
    """Refuse a metric that torchmetrics does not have, or that is no single number, before anything is trained."""
    if not extra:
        return
    import torch
    import torchmetrics

    classes = vars(torchmetrics.classification).items()
    known = [n for n, each in classes if n.startswith("Binary") and issubclass(each, torchmetrics.Metric)]
    for name, metric in extra.items():
        if metric.torchmetric not in known:
            key = f"metric.{name}.torchmetric"
            reason = "is no binary metric of torchmetrics.classification"
            raise UserError(
                reason,
                key=key,
                value=metric.torchmetric,
                remedy=nearest(metric.torchmetric, known),
                code=Code.UNKNOWN_CHOICE,
            )
        try:
            _compute(metric.torchmetric, torch.tensor([0.2, 0.8]), torch.tensor([0, 1]))
        except (TypeError, ValueError):
            reason = "needs settings of its own, or is not a single number"
            remedy = "Take one such as BinarySpecificity or BinaryAveragePrecision."
            key = f"metric.{name}.torchmetric"
            raise UserError(reason, key=key, value=metric.torchmetric, remedy=remedy, code=Code.UNSUPPORTED) from None


def _compute(kind: str, scores: torch.Tensor, labels: torch.Tensor) -> float | None:
    """A metric of torchmetrics; None where it is not a finite number."""
    import torchmetrics  # takes more than a second: training begins without it

    metric: torchmetrics.Metric = getattr(torchmetrics.classification, kind)()
    if hasattr(metric, "threshold"):
        metric.threshold = _BELOW_THRESHOLD
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that only one label occurs: the data's own warnings say so
        metric.update(scores, labels)
        value = float(metric.compute())
    return value if math.isfinite(value) else None
