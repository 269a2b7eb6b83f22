"""Confusion counts of predicted classes, and accuracy, F1 and MCC computed from them. Needs no torch.

Two classes have four counts, and F1 is that of label 1. With k classes, every metric here depends on three counts of
each class only: the correct predictions of it, its labels, and its predictions. 0 / 0 gives 0 in both.
"""

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
        return ratio(tp + tn, tp + fp + fn + tn)
    if measure == "f1":
        return ratio(2 * tp, 2 * tp + fp + fn)
    return ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


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
        accuracy = ratio(tp + tn, n)
        return np.stack([1 - accuracy, -accuracy, -accuracy, 1 - accuracy], -1)
    if measure == "f1":
        f1, scale = compute_metric(counts, "f1"), 2 * tp + fp + fn
        return np.stack([ratio(n * g, scale) for g in (2 - 2 * f1, -f1, -f1, np.zeros_like(f1))], -1)
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
        slope: Floats = n * (ratio(product, root) - mcc / 2 * (ratio(1.0, predicted) + ratio(1.0, labelled)))
        return slope

    cells = [
        (tn, predicted_1, labelled_1),
        (-fn, predicted_1, labelled_0),
        (-fp, predicted_0, labelled_1),
        (tp, predicted_0, labelled_0),
    ]
    return np.asarray(np.where(root[..., None] > 0, np.stack([gradient(*cell) for cell in cells], -1), 0.0))


def confusion_matrix(labels: ArrayLike, predicted: ArrayLike, classes: int) -> NDArray[np.int64]:
    """Return the number of examples by label (row) and predicted class (column): (k, k).

    Args:
        labels: (N,) 0 to k - 1.
        predicted: (N,) 0 to k - 1.
        classes: k.
    """
    cell = np.asarray(labels, int) * classes + np.asarray(predicted, int)
    return np.bincount(cell, minlength=classes**2).reshape(classes, classes)


def class_totals(labels: ArrayLike, predicted: ArrayLike, classes: int | None = None) -> Floats:
    """Return the number of correct predictions, labels and predictions of each class: (..., 3, k) as floats.

    Args:
        labels: (N,) 0 to k - 1.
        predicted: (..., N) 0 to k - 1.
        classes: k; None takes the smallest that the classes need, which changes no metric.
    """
    y, p = np.asarray(labels, int), np.asarray(predicted, int)
    k = classes or 1 + int(max(y.max(initial=0), p.max(initial=0)))
    totals = np.empty((*p.shape[:-1], 3, k))
    labelled = np.bincount(y, minlength=k)
    for index in np.ndindex(p.shape[:-1]):
        hits = y[p[index] == y]
        totals[index] = np.bincount(hits, minlength=k), labelled, np.bincount(p[index], minlength=k)
    return totals


def compute_class_metric(totals: ArrayLike, measure: str = "mcc") -> Floats:
    """Return a metric of k classes, one value per array of counts: (...).

    macro_f1 is the mean F1 of the classes that occur among labels or predictions, and weighted_f1 the mean of all
    weighted by labels, both as in scikit-learn. mcc is the R_K of Gorodkin (2004, eq. 8), for k = 2 Matthews'.

    Args:
        totals: (..., 3, k) as `class_totals` returns them.
        measure: accuracy, macro_f1 or weighted_f1; mcc for any other name.
    """
    hits, labelled, predicted = np.moveaxis(np.asarray(totals, float), -2, 0)  # (..., k) each
    n = labelled.sum(-1)
    if measure == "accuracy":
        return ratio(hits.sum(-1), n)
    if measure in ("macro_f1", "weighted_f1"):
        f1 = ratio(2 * hits, labelled + predicted)
        weights = labelled + predicted > 0 if measure == "macro_f1" else labelled
        return ratio((f1 * weights).sum(-1), weights.sum(-1))
    covariance = hits.sum(-1) * n - (labelled * predicted).sum(-1)
    return ratio(covariance, np.sqrt((n**2 - (predicted**2).sum(-1)) * (n**2 - (labelled**2).sum(-1))))


def class_influence(totals: ArrayLike, measure: str = "mcc") -> Floats:
    """Return the influence of one example of each confusion cell on a metric of k classes, as `influence` does for two.

    Args:
        totals: (..., 3, k) as `class_totals` returns them.
        measure: as in `compute_class_metric`.

    Returns:
        (..., k, k) by label and predicted class; of use for cells that occur. 0 where the metric is 0 / 0.
    """
    totals = np.asarray(totals, float)
    hits, labelled, predicted = np.moveaxis(totals, -2, 0)  # (..., k) each
    n = labelled.sum(-1)[..., None]
    value = compute_class_metric(totals, measure)[..., None]
    # Every influence is the sum of a term of the label, one of the predicted class, and one if they are equal.
    if measure == "accuracy":
        of_label, of_predicted, if_correct = -value + 0 * hits, 0 * hits, 1 + 0 * hits
    elif measure in ("macro_f1", "weighted_f1"):
        size = labelled + predicted
        f1 = ratio(2 * hits, size)
        weight = ratio(n, size * (size > 0).sum(-1)[..., None]) if measure == "macro_f1" else ratio(labelled, size)
        of_label = of_predicted = -weight * f1
        of_label = of_label + (f1 - value if measure == "weighted_f1" else 0.0)
        if_correct = 2 * weight
    else:
        spread_predicted = n**2 - (predicted**2).sum(-1)[..., None]
        spread_labelled = n**2 - (labelled**2).sum(-1)[..., None]
        root = np.sqrt(spread_predicted * spread_labelled)
        scale, correct = ratio(n, root), hits.sum(-1)[..., None]
        of_label = scale * (correct - predicted) - value * ratio(n * (n - labelled), spread_labelled)
        of_predicted = -scale * labelled - value * ratio(n * (n - predicted), spread_predicted)
        of_label, of_predicted = np.where(root > 0, of_label, 0.0), np.where(root > 0, of_predicted, 0.0)
        if_correct = scale * n + 0 * hits
    by_cell = of_label[..., :, None] + of_predicted[..., None, :] + if_correct[..., None] * np.eye(hits.shape[-1])
    return np.asarray(by_cell)


def ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    """Return element-wise ratios; 0 where the denominator is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.asarray(np.divide(above, below, out=np.zeros(above.shape), where=below > 0))
