"""The bootstrap over the examples of one model or of a pair of models, for every main metric.

A metric of classes depends only on how often each combination of label and two predictions occurs, so a resample is one
draw of these counts. A metric of numbers needs the examples themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.evaluation import main_metric
from lora_bench.evaluation.confusion import compute_class_metric, compute_metric
from lora_bench.evaluation.regression import SMALLEST_SPREAD

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.random import Generator
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

RESAMPLES = 10_000
"""Default number of resamples."""
MIN_RESAMPLES = 1_000
"""Number of resamples of the largest splits, where the metric is one of numbers."""
MAX_DRAWS = 6_000_000
"""Examples drawn in all, above which the metrics of numbers have fewer resamples."""
CHUNK_VALUES = 2_000_000
"""Numbers in memory at a time, for each array of a chunk of resamples."""


@dataclass(frozen=True)
class Bootstrap:
    """A difference `a - b` with its percentile interval, standard error and two-sided p value over resamples."""

    difference: float
    low: float
    high: float
    p: float
    error: float


def paired_bootstrap(
    labels: ArrayLike,
    predicted_a: ArrayLike,
    predicted_b: ArrayLike,
    measure: str = "mcc",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Bootstrap:
    """Return the percentile bootstrap over the examples of one pair of models.

    Args:
        labels: (N,) classes 0, 1, …, or numbers.
        predicted_a: (N,) predicted classes or numbers.
        predicted_b: (N,) predictions of the rival.
        measure: one of `ALL_MAIN_METRICS`.
        confidence: of the interval.
        resamples: number of resamples. It is lowered for metrics of numbers, so that at most `MAX_DRAWS` examples are
            drawn, but not below `MIN_RESAMPLES`.
        seed: of the random draws.
    """
    y, a, b = (np.asarray(x) for x in (labels, predicted_a, predicted_b))
    values = _resample(y, a, b, measure, resamples, seed)  # (R, 2)
    resampled = values[:, 0] - values[:, 1]
    observed = float(main_metric.compute(y, a, measure) - main_metric.compute(y, b, measure))
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    n_beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p = min(1.0, 2 * (n_beyond + 1) / (len(resampled) + 1))
    return Bootstrap(observed, float(low), float(high), p, float(resampled.std(ddof=1)))


def bootstrap_interval(
    labels: ArrayLike,
    predicted: ArrayLike,
    measure: str = "mcc",
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bounds of the percentile interval of one model's metric over resamples of the examples.

    The interval is about other examples of the same kind, not about other seeds of the training.

    Args:
        labels: (N,) classes 0, 1, …, or numbers.
        predicted: (N,) predicted classes or numbers.
        measure: one of `ALL_MAIN_METRICS`.
        confidence: of the interval.
        resamples: number of resamples, lowered as in `paired_bootstrap`.
        seed: of the random draws.
    """
    y, a = np.asarray(labels), np.asarray(predicted)
    low, high = np.quantile(
        _resample(y, a, a, measure, resamples, seed)[:, 0], [(1 - confidence) / 2, (1 + confidence) / 2]
    )
    return float(low), float(high)


def _resample(y: NDArray[Any], a: NDArray[Any], b: NDArray[Any], measure: str, resamples: int, seed: int) -> Floats:
    """Return the metric of both models in each resample: (R, 2)."""
    rng = np.random.default_rng(seed)
    if main_metric.is_of_numbers(measure):
        resamples = min(resamples, max(MIN_RESAMPLES, MAX_DRAWS // len(y)))
        return _resample_numbers(y, a, b, measure, resamples, rng)
    if main_metric.is_of_two_classes(measure, y, a, b):
        return _resample_two_classes(y, a, b, measure, resamples, rng)
    return _resample_classes(y, a, b, measure, resamples, rng)


def _resample_two_classes(
    y: NDArray[Any], a: NDArray[Any], b: NDArray[Any], measure: str, resamples: int, rng: Generator
) -> Floats:
    """Return both metrics of two classes in each resample: (R, 2)."""
    joint = np.bincount(4 * y.astype(int) + 2 * a.astype(int) + b.astype(int), minlength=8)  # (8,)
    draws = rng.multinomial(len(y), joint / len(y), size=resamples)  # (R, 8)
    nnn, nnb, nan, nab, ynn, ynb, yan, yab = np.moveaxis(draws, -1, 0)  # label, a, b: y, a, b where they are 1
    of_a = np.stack([yan + yab, nan + nab, ynn + ynb, nnn + nnb], -1)
    of_b = np.stack([ynb + yab, nnb + nab, ynn + yan, nnn + nan], -1)
    return np.stack([compute_metric(of_a, measure), compute_metric(of_b, measure)], -1)


def _resample_classes(
    y: NDArray[Any], a: NDArray[Any], b: NDArray[Any], measure: str, resamples: int, rng: Generator
) -> Floats:
    """Return both metrics of k classes in each resample: (R, 2)."""
    k = 1 + int(max(y.max(), a.max(), b.max()))
    triples, counts = np.unique(np.stack([y, a, b], -1).astype(int), axis=0, return_counts=True)  # (J, 3), (J,)
    labels, of_a, of_b = np.eye(k)[triples.T]  # (J, k) each, 1 in the column of the class
    sums = np.concatenate([labels * of_a, labels, of_a, labels * of_b, labels, of_b], axis=1)  # (J, 6 k)
    values = []
    for rows in _chunks(resamples, len(counts) + 6 * k):
        draws = rng.multinomial(len(y), counts / len(y), size=rows)  # (R, J)
        totals = (draws @ sums).reshape(rows, 2, 3, k)
        values.append(compute_class_metric(totals, measure))  # (R, 2)
    return np.concatenate(values)


def _resample_numbers(
    y: NDArray[Any], a: NDArray[Any], b: NDArray[Any], measure: str, resamples: int, rng: Generator
) -> Floats:
    """Return both metrics of numbers in each resample: (R, 2)."""
    n = len(y)
    weighted = [_values(x, measure) for x in (y, a, b)]
    values = []
    for rows in _chunks(resamples, n):
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n) / n  # (R, N)
        labels, of_a, of_b = (value(weights) for value in weighted)  # (R, N) or (N,)
        if measure == "r2":
            spread = _variance(weights, labels)
            of_both = [_ratio(spread - weights @ (x - y) ** 2, spread) for x in (a, b)]
        else:
            of_both = [_correlation(weights, labels, x) for x in (of_a, of_b)]
        values.append(np.stack(of_both, -1))
    return np.concatenate(values)


def _values(x: Floats, measure: str) -> Callable[[Floats], Floats]:
    """Return a function of weights (R, N) that returns what a correlation is of: the values (N,), or ranks (R, N).

    A rank is the weight of the smaller values, and half of that of equal ones.
    """
    if measure != "spearman":
        centred = x - x.mean()
        return lambda weights: centred
    order = np.argsort(x, kind="stable")
    _, first, inverse = np.unique(x[order], return_index=True, return_inverse=True)
    number = np.empty(len(x), int)  # (N,) of an example's value among the distinct ones
    number[order] = inverse

    def ranks(weights: Floats) -> Floats:
        by_value = np.add.reduceat(weights[:, order], first, axis=1)  # (R, distinct values)
        return np.asarray((by_value.cumsum(axis=1) - by_value / 2)[:, number])

    return ranks


def _correlation(weights: Floats, x: Floats, z: Floats) -> Floats:
    """Return weighted correlations (R,) of values (N,) or (R, N); 0 where one of them is constant."""
    x, z = (v - (weights * v).sum(axis=1, keepdims=True) for v in (x, z))
    covariance = (weights * x * z).sum(axis=1)
    return _ratio(covariance, np.sqrt(_variance(weights, x) * _variance(weights, z)))


def _variance(weights: Floats, x: Floats) -> Floats:
    """Return weighted variances (R,) of values (N,) or (R, N); 0 for values that are constant up to rounding."""
    centred = x - (weights * x).sum(axis=1, keepdims=True)
    variance = (weights * centred**2).sum(axis=1)
    return np.where(variance > (SMALLEST_SPREAD * np.abs(x).max()) ** 2, variance, 0.0)


def _ratio(above: Floats, below: Floats) -> Floats:
    """Return element-wise ratios; 0 where the denominator is 0."""
    return np.asarray(np.divide(above, below, out=np.zeros(above.shape), where=below > 0))


def _chunks(resamples: int, width: int) -> Iterator[int]:
    """Yield the numbers of resamples to draw at a time, for `width` numbers of each."""
    size = max(1, CHUNK_VALUES // width)
    yield from (min(size, resamples - start) for start in range(0, resamples, size))
