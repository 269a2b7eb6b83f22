"""Confusion counts of binary predictions, and accuracy, F1 and MCC computed from them. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


def confusion_counts(labels: ArrayLike, predicted: ArrayLike) -> Floats:
    """Return true positives, false positives, false negatives and true negatives.

    Args:
        labels: (N,) 0 or 1.
        predicted: (..., N) 0 or 1.

    Returns:
        (..., 4) counts as floats.
    """
    y, p = np.asarray(labels, bool), np.asarray(predicted, bool)
    return np.stack([(p & y).sum(-1), (p & ~y).sum(-1), (~p & y).sum(-1), (~p & ~y).sum(-1)], -1).astype(float)


def compute_metric(counts: ArrayLike, measure: str = "mcc") -> Floats:
    """Return accuracy, F1 or MCC for confusion counts (..., 4), one value per row of counts (...); 0 / 0 gives 0.

    Args:
        counts: as `confusion_counts` returns them.
        measure: accuracy or f1; MCC for any other name.
    """
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, float), -1, 0)
    if measure == "accuracy":
        return _ratio(tp + tn, tp + fp + fn + tn)
    if measure == "f1":
        return _ratio(2 * tp, 2 * tp + fp + fn)
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def influence(counts: ArrayLike, measure: str = "mcc") -> Floats:
    """Return the influence of one example of each confusion cell on a metric: N times the derivative by its count.

    This is the infinitesimal jackknife (Efron 1982, section 6): over the examples the influences have mean 0, and their
    variance over N estimates the variance of the metric.

    Args:
        counts: (..., 4) as `confusion_counts` returns them.
        measure: accuracy or f1; MCC for any other name.

    Returns:
        (..., 4) for tp, fp, fn, tn; 0 where the metric is 0 / 0.
    """
    counts = np.asarray(counts, float)
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    n = counts.sum(-1)
    if measure == "accuracy":
        accuracy = _ratio(tp + tn, n)
        return np.stack([1 - accuracy, -accuracy, -accuracy, 1 - accuracy], -1)
    if measure == "f1":
        f1, scale = compute_metric(counts, "f1"), 2 * tp + fp + fn
        return np.stack([_ratio(n * g, scale) for g in (2 - 2 * f1, -f1, -f1, np.zeros_like(f1))], -1)
    mcc = compute_metric(counts, "mcc")
    predicted_1, predicted_0, labelled_1, labelled_0 = tp + fp, fn + tn, tp + fn, fp + tn
    root = np.sqrt(predicted_1 * predicted_0 * labelled_1 * labelled_0)

    def gradient(product: Floats, predicted: Floats, labelled: Floats) -> Floats:
        """Return N times the derivative (...) of the MCC by the count of one cell.

        Args:
            product: the derivative of tp · tn - fp · fn by that count.
            predicted: examples predicted as in the cell.
            labelled: examples labelled as in the cell.
        """
        slope: Floats = n * (_ratio(product, root) - mcc / 2 * (_ratio(1.0, predicted) + _ratio(1.0, labelled)))
        return slope

    cells = [
        (tn, predicted_1, labelled_1),
        (-fn, predicted_1, labelled_0),
        (-fp, predicted_0, labelled_1),
        (tp, predicted_0, labelled_0),
    ]
    return np.asarray(np.where(root[..., None] > 0, np.stack([gradient(*cell) for cell in cells], -1), 0.0))


def _ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    """Return element-wise ratios; 0 where the denominator is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.asarray(np.divide(above, below, out=np.zeros(above.shape), where=below > 0))
