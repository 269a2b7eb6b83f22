"""Metrics of predicted numbers, and the influence of each example on them. Needs no torch.

An influence is the derivative of the metric by the weight of one example, times N: the infinitesimal jackknife (Efron
1982, section 6), as in `confusion`. For Spearman's correlation it has the effect of the example on the ranks of the
others (Croux & Dehon 2010).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_bench.evaluation.confusion import ratio

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

SMALLEST_SPREAD = 1e-12
"""Values whose standard deviation is at most this share of their largest magnitude count as constant."""


def compute_metric(labels: ArrayLike, scores: ArrayLike, measure: str) -> Floats:
    """Return a metric of predicted numbers: (...); a correlation or R² that is 0 / 0 gives 0.

    Args:
        labels: (N,).
        scores: (..., N).
        measure: pearson, spearman (of midranks), r2 (1 less the residual sum of squares over the total one), mse or
            mae.
    """
    y, p = np.asarray(labels, float), np.asarray(scores, float)
    if measure == "mse":
        return np.asarray(((p - y) ** 2).mean(-1))
    if measure == "mae":
        return np.asarray(np.abs(p - y).mean(-1))
    if measure == "r2":
        spread = _centre(y)
        return np.asarray(np.where(spread.any(), 1 - ratio(((p - y) ** 2).mean(-1), (spread**2).mean()), 0.0))
    if measure == "spearman":
        y, p = midranks(y), midranks(p)
    return np.asarray((_standardise(y) * _standardise(p)).mean(-1))


def influence(labels: ArrayLike, scores: ArrayLike, measure: str) -> Floats:
    """Return the influence of each example on a metric: (..., N), with mean 0; 0 where the metric is 0 / 0.

    Args:
        labels: (N,).
        scores: (..., N).
        measure: as in `compute_metric`, without mae.
    """
    y, p = np.asarray(labels, float), np.asarray(scores, float)
    value = compute_metric(y, p, measure)[..., None]  # (..., 1)
    if measure == "mse":
        return np.asarray((p - y) ** 2 - value)
    if measure == "r2":
        spread = _centre(y)
        residual, squared = (p - y) ** 2, np.broadcast_to(spread**2, p.shape)
        return ratio((1 - value) * squared - residual, squared.mean(-1, keepdims=True))
    if measure == "spearman":
        return _spearman_influence(y, p, value)
    u, v = _standardise(y), _standardise(p)
    is_defined = (u != 0).any() & (v != 0).any(-1, keepdims=True)
    return np.where(is_defined, u * v - value * (u**2 + v**2) / 2, 0.0)


def midranks(values: Floats) -> Floats:
    """Return the ranks from 1 to N along the last axis; equal values have the mean of their ranks: (..., N)."""
    from scipy.stats import rankdata  # late: a comparison of classes does not need it

    return np.asarray(rankdata(values, axis=-1))


def _spearman_influence(labels: Floats, scores: Floats, value: Floats) -> Floats:
    """Return the influence on Spearman's correlation, the Pearson correlation of distribution functions: (..., N).

    With F(x) = P(X < x) + P(X = x) / 2, whose mean is 1/2 for any distribution, a weight e on the point (x, y) changes
    F(X) by e (h(X, x) - F(X)), where h is 1 if x < X, 1/2 if they are equal, else 0. So the derivative of E[F G] is
    F(x) G(y) - 3 E[F G] + E[h(X, x) G(Y)] + E[F(X) h(Y, y)], and that of E[F²] likewise.

    Args:
        labels: (N,).
        scores: (..., N).
        value: (..., 1) the correlation.
    """
    n = labels.shape[-1]
    f, g = (midranks(labels) - 0.5) / n, (midranks(scores) - 0.5) / n  # (N,), (..., N)
    f = np.broadcast_to(f, g.shape)

    def slope(a: Floats, b: Floats) -> Floats:
        """Return the derivative of E[a b] by the weight of each example: (..., N)."""
        product: Floats = a * b
        return np.asarray(product - 3 * product.mean(-1, keepdims=True) + _mean_above(a, b) + _mean_above(b, a))

    variance_f, variance_g = ((a**2).mean(-1, keepdims=True) - 0.25 for a in (f, g))
    variance_f, variance_g = (np.where(v > SMALLEST_SPREAD, v, 0.0) for v in (variance_f, variance_g))
    root = np.sqrt(variance_f * variance_g)
    change = ratio(slope(f, g), root) - value / 2 * (ratio(slope(f, f), variance_f) + ratio(slope(g, g), variance_g))
    return np.where(root > 0, change, 0.0)


def _mean_above(order: Floats, weights: Floats) -> Floats:
    """Return, for each example, the sum of the weights of those above it and half of its equals', over N: (..., N)."""
    n = order.shape[-1]
    sums = np.empty(order.shape)
    for index in np.ndindex(order.shape[:-1]):
        _, inverse = np.unique(order[index], return_inverse=True)
        by_value = np.bincount(inverse, weights=weights[index])
        sums[index] = (by_value.sum() - by_value.cumsum() + by_value / 2)[inverse]
    return np.asarray(sums / n)


def _centre(values: Floats) -> Floats:
    """Return values less their mean along the last axis: (..., N); exactly 0 if they are constant up to rounding."""
    centred = values - values.mean(-1, keepdims=True)
    largest = np.abs(values).max(-1, keepdims=True)
    return np.where(centred.std(-1, keepdims=True) > SMALLEST_SPREAD * largest, centred, 0.0)


def _standardise(values: Floats) -> Floats:
    """Return values with mean 0 and standard deviation 1 along the last axis: (..., N); 0 if they are constant."""
    centred = _centre(values)
    return ratio(centred, np.sqrt((centred**2).mean(-1, keepdims=True)))
