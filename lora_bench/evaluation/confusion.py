"""Counts of a binary confusion matrix, and accuracy, F1 and MCC from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


def confusion_counts(labels: ArrayLike, predicted: ArrayLike) -> Floats:
    """True positives, false positives, false negatives, true negatives: (..., 4) for predictions (..., N)."""
    y, p = np.asarray(labels, bool), np.asarray(predicted, bool)
    return np.stack([(p & y).sum(-1), (p & ~y).sum(-1), (~p & y).sum(-1), (~p & ~y).sum(-1)], -1).astype(float)


def compute_metric(counts: ArrayLike, measure: str = "mcc") -> Floats:
    """Accuracy, F1 or MCC of confusion counts (..., 4), for many at once: (...); 0 where it is 0 / 0."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, float), -1, 0)
    if measure == "accuracy":
        return _ratio(tp + tn, tp + fp + fn + tn)
    if measure == "f1":
        return _ratio(2 * tp, 2 * tp + fp + fn)
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def influence(counts: ArrayLike, measure: str = "mcc") -> Floats:
    """What an example of each of the four kinds adds to the measure: N times its derivative by the kind's count.

    The infinitesimal jackknife (Efron 1982, section 6): over the examples the influences have mean 0, and their
    variance over N is that of the measure. (..., 4) for counts (..., 4); 0 where the measure is 0 / 0.
    """
    counts = np.asarray(counts, float)
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    n = counts.sum(-1)
    if measure == "accuracy":
        right = _ratio(tp + tn, n)
        return np.stack([1 - right, -right, -right, 1 - right], -1)
    if measure == "f1":
        f1, scale = compute_metric(counts, "f1"), 2 * tp + fp + fn
        return np.stack([_ratio(n * g, scale) for g in (2 - 2 * f1, -f1, -f1, np.zeros_like(f1))], -1)
    mcc = compute_metric(counts, "mcc")
    said1, said0, are1, are0 = tp + fp, fn + tn, tp + fn, fp + tn
    root = np.sqrt(said1 * said0 * are1 * are0)

    def gradient(product: Floats, said: Floats, are: Floats) -> Floats:
        slope: Floats = n * (_ratio(product, root) - mcc / 2 * (_ratio(1.0, said) + _ratio(1.0, are)))
        return slope

    kinds = [(tn, said1, are1), (-fn, said1, are0), (-fp, said0, are1), (tp, said0, are0)]
    return np.asarray(np.where(root[..., None] > 0, np.stack([gradient(*kind) for kind in kinds], -1), 0.0))


def _ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.asarray(np.divide(above, below, out=np.zeros(above.shape), where=below > 0))
