"""Whether a difference is real: intervals, paired tests, corrections, power. Pure functions; scipy comes late.

Two things are chance in a comparison of two methods: the seeds they were trained with and the examples they were
scored on. A t test over seeds takes the examples for granted, a bootstrap or McNemar's test over examples takes the
trained models for granted. `crossed_test` counts both and is the one that `compare` decides by; the others are the
field's habit, right for what they ask, and kept beside it.

Predictions are boolean: `scores >= threshold`. A difference is always that of `a` from `b`: above 0, `a` is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

MEASURES = ("accuracy", "f1", "mcc")
CONFIDENCE = 0.95
VERDICTS = ("better", "worse", "indistinguishable", "unresolved")


# -- measures of counts --


def confusion(labels: ArrayLike, predicted: ArrayLike) -> Floats:
    """True positives, false positives, false negatives, true negatives: (..., 4) for predictions (..., N)."""
    y, p = np.asarray(labels, bool), np.asarray(predicted, bool)
    return np.stack([(p & y).sum(-1), (p & ~y).sum(-1), (~p & y).sum(-1), (~p & ~y).sum(-1)], -1).astype(float)


def measure_of(counts: ArrayLike, measure: str = "mcc") -> Floats:
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
        f1, scale = measure_of(counts, "f1"), 2 * tp + fp + fn
        return np.stack([_ratio(n * g, scale) for g in (2 - 2 * f1, -f1, -f1, np.zeros_like(f1))], -1)
    mcc = measure_of(counts, "mcc")
    said1, said0, are1, are0 = tp + fp, fn + tn, tp + fn, fp + tn
    root = np.sqrt(said1 * said0 * are1 * are0)

    def gradient(product: Floats, said: Floats, are: Floats) -> Floats:
        return n * (_ratio(product, root) - mcc / 2 * (_ratio(1.0, said) + _ratio(1.0, are)))

    kinds = [(tn, said1, are1), (-fn, said1, are0), (-fp, said0, are1), (tp, said0, are0)]
    return np.where(root[..., None] > 0, np.stack([gradient(*kind) for kind in kinds], -1), 0.0)


def _ratio(above: ArrayLike, below: ArrayLike) -> Floats:
    above, below = np.broadcast_arrays(np.asarray(above, float), np.asarray(below, float))
    return np.divide(above, below, out=np.zeros(above.shape), where=below > 0)


def best_threshold(labels: ArrayLike, scores: ArrayLike, measure: str = "mcc") -> float:
    """The threshold with the best measure on these scores, the nearest to 0.5 of equal ones.

    To be chosen on the selection split: on the reported one it would flatter.
    """
    y, s = np.asarray(labels, bool), np.asarray(scores, float)
    order = np.argsort(-s, kind="stable")
    last = np.flatnonzero(np.append(np.diff(s[order]) != 0, True))  # the last row of each distinct score
    tp, said = np.cumsum(y[order])[last], last + 1.0
    counts = np.stack([tp, said - tp, y.sum() - tp, len(y) - said - (y.sum() - tp)], -1)
    values = np.append(measure_of(counts, measure), measure_of([0, 0, y.sum(), (~y).sum()], measure))
    distinct = s[order][last]
    # Between a score that is still taken for 1 and the next that is not; beyond the smallest, everything is 1.
    cuts = np.concatenate([(distinct[:-1] + distinct[1:]) / 2, [min(0.0, distinct[-1])], [1 + abs(distinct[0])]])
    best = values >= values.max() - 1e-12
    if best[np.searchsorted(-distinct, -0.5, side="right") - 1]:  # what 0.5 itself does is among the best
        return 0.5
    return float(cuts[best][np.argmin(np.abs(cuts[best] - 0.5))])


# -- one method --


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values, sample standard deviation, bounds of the mean; what one value cannot tell is None."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int


def interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval for the mean over seeds."""
    x = np.asarray(values, float)
    return interval_of(float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else None, len(x), confidence)


def interval_of(mean: float, std: float | None, n: int, confidence: float = CONFIDENCE) -> Interval:
    """The same from the mean, the sample standard deviation and the number of the values."""
    if std is None:
        return Interval(mean, None, None, None, n)
    half = _t_quantile((1 + confidence) / 2, n - 1) * std / math.sqrt(n)
    return Interval(mean, std, mean - half, mean + half, n)


# -- two methods --


@dataclass(frozen=True)
class Comparison:
    """A difference `a - b`, how sure it is, and what it was found from."""

    measure: str
    difference: float
    low: float
    high: float
    p: float
    """Two-sided, of no difference."""
    error: float
    """Standard error of the difference."""
    degrees: float
    """Degrees of freedom of Student's t that it is referred to; inf is the normal distribution."""
    seeds: int
    """1: the examples are the only source of chance that was counted."""
    examples: int


@dataclass(frozen=True)
class McNemar:
    """Of the examples that one of two predictors got right alone: how many each, and the mid-p value."""

    only_a: int
    only_b: int
    p: float


def crossed_test(
    labels: ArrayLike,
    predicted_a: ArrayLike,
    predicted_b: ArrayLike,
    measure: str = "mcc",
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Whether `a` beats `b`, with seeds and examples as two crossed sources of chance.

    Each of S paired seeds scores the same N examples, as readers do in a multi-reader multi-case study. The
    pseudo-values d[s, i] = difference of seed s + influence of example i on it follow a two-way random layout, whose
    mean squares give Var(d..) = (MS_seed + max(MS_example - MS_rest, 0)) / (S N), referred to Student's t with Hillis'
    degrees of freedom (.)² / (MS_seed² / (S - 1)). Dorfman, Berbaum & Metz 1992; Hillis 2007, Statistics in Medicine
    26:596. Where seeds differ much it becomes the paired t test over seeds.

    As published it rejects too often with few seeds (scripts/simulate_tests: 7 % with three, 12 % with two), since
    MS_seed may come out small by chance. So it is taken to be at least MS_rest, below which its expectation never lies.
    With two or three seeds that hardly differ this makes the test conservative, and costs power.

    Args:
        labels: (N,) 0 or 1.
        predicted_a: (S, N), or (N,) for one seed: what each seed's model says, row s of both from the same seed.
        predicted_b: the same of the rival.
        measure: accuracy, f1 or mcc.

    With one seed the variance over seeds cannot be known: then only the examples are counted (`seeds` is 1).
    """
    y = np.asarray(labels, bool)
    a, b = np.atleast_2d(np.asarray(predicted_a, bool)), np.atleast_2d(np.asarray(predicted_b, bool))
    pseudo = _pseudo_values(y, a, measure) - _pseudo_values(y, b, measure)  # (S, N)
    S, N = pseudo.shape
    by_seed, by_example, mean = pseudo.mean(1), pseudo.mean(0), float(pseudo.mean())
    squares = float(((by_example - mean) ** 2).sum())
    if S == 1:
        error, degrees = math.sqrt(squares / (N - 1) / N), float(N - 1)
        return _t_comparison(measure, mean, error, degrees, confidence, S, N)
    ms_seed = N * float(((by_seed - mean) ** 2).sum()) / (S - 1)
    ms_example = S * squares / (N - 1)
    whole = float(((pseudo - mean) ** 2).sum())
    ms_rest = max(0.0, whole - (S - 1) * ms_seed - (N - 1) * ms_example) / ((S - 1) * (N - 1))
    ms_seed = max(ms_seed, ms_rest)  # what it estimates is never less
    total = ms_seed + max(ms_example - ms_rest, 0.0)
    degrees = (S - 1) * (total / ms_seed) ** 2 if ms_seed else math.inf
    return _t_comparison(measure, mean, math.sqrt(total / (S * N)), degrees, confidence, S, N)


def _pseudo_values(y: NDArray[np.bool_], predicted: NDArray[np.bool_], measure: str) -> Floats:
    counts = confusion(y, predicted)  # (S, 4)
    kind = np.where(predicted, 0, 2) + np.where(y, 0, 1)  # (S, N): tp 0, fp 1, fn 2, tn 3
    added = np.take_along_axis(influence(counts, measure), kind, axis=1)  # (S, N)
    return measure_of(counts, measure)[:, None] + added


def seeds_test(values_a: ArrayLike, values_b: ArrayLike, confidence: float = CONFIDENCE) -> Comparison:
    """Paired t test over seeds (at least two); the examples are taken for granted."""
    d = np.asarray(values_a, float) - np.asarray(values_b, float)
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    return _t_comparison("seeds", float(d.mean()), error, len(d) - 1, confidence, len(d), 0)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """McNemar's test with the mid-p value (Fagerland et al. 2013); the exact one is conservative."""
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_a, only_b, float(_mid_p(np.array([only_a]), np.array([only_b]))[0]))


def paired_bootstrap(
    labels: ArrayLike,
    predicted_a: ArrayLike,
    predicted_b: ArrayLike,
    measure: str = "mcc",
    confidence: float = CONFIDENCE,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Percentile bootstrap over the examples of one pair of models (predictions (N,)).

    A resample only matters through how often each (label, a, b) occurs, so it is one draw of eight counts.
    """
    y, a, b = (np.asarray(x, bool) for x in (labels, predicted_a, predicted_b))
    joint = np.bincount(4 * y + 2 * a + b, minlength=8)  # (8,)
    draws = np.random.default_rng(seed).multinomial(len(y), joint / len(y), size=resamples)  # (R, 8)

    def difference(counts: NDArray[Any]) -> Floats:
        nnn, nnb, nan, nab, ynn, ynb, yan, yab = np.moveaxis(counts, -1, 0)  # label, a, b: who says 1
        of_a = np.stack([yan + yab, nan + nab, ynn + ynb, nnn + nnb], -1)
        of_b = np.stack([ynb + yab, nnb + nab, ynn + yan, nnn + nan], -1)
        return measure_of(of_a, measure) - measure_of(of_b, measure)

    found, resampled = float(difference(joint)), difference(draws)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    return Comparison(measure, found, float(low), float(high), p, float(resampled.std(ddof=1)), math.inf, 1, len(y))


def effect_size(differences: ArrayLike) -> float | None:
    """Standardised mean of paired differences over seeds: Cohen's d_z with Hedges' correction; None for one seed."""
    d = np.asarray(differences, float)
    if len(d) < 2 or not d.std(ddof=1):
        return None
    return float(d.mean() / d.std(ddof=1) * (1 - 3 / (4 * (len(d) - 1) - 1)))


# -- many comparisons, verdicts, power --


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): reject those at most alpha, and one false rejection among all has chance alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(comparison: Comparison, margin: float, p: float | None = None, alpha: float = 0.05) -> str:
    """What a comparison says, in one word of `VERDICTS`.

    Args:
        margin: a difference up to this is of no account.
        p: the p value to go by, if it was adjusted for many comparisons.

    Returns:
        `indistinguishable` where two one-sided tests (Schuirmann 1987) show the difference to lie within the margin,
        also if it is surely not 0; else `better` or `worse` where p is at most alpha; else `unresolved`: the
        comparison was too small to tell.
    """
    half = _t_quantile(1 - alpha, comparison.degrees) * comparison.error
    if -margin < comparison.difference - half and comparison.difference + half < margin:
        return "indistinguishable"
    if (comparison.p if p is None else p) <= alpha:
        return "better" if comparison.difference > 0 else "worse"
    return "unresolved"


def power(comparison: Comparison, difference: float, alpha: float = 0.05) -> float:
    """The chance that a comparison with this standard error finds a true `difference` (noncentral t)."""
    from scipy.special import nctdtr

    if not comparison.error:
        return 1.0 if difference else alpha
    degrees, shift = min(comparison.degrees, 1e6), abs(difference) / comparison.error
    critical = _t_quantile(1 - alpha / 2, degrees)
    # Far in a tail scipy has no value: there it is 0.
    above, below = np.nan_to_num([nctdtr(degrees, shift, critical), nctdtr(degrees, shift, -critical)])
    return float(1 - above + below)


def detectable(comparison: Comparison, chance: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference that a comparison with this standard error finds with that chance."""
    from scipy.optimize import brentq

    if not comparison.error:
        return 0.0
    high = comparison.error
    while power(comparison, high, alpha) < chance:
        high *= 2
    return float(brentq(lambda difference: power(comparison, difference, alpha) - chance, 0.0, high))


def mcnemar_power(examples: int, only_a: float, only_b: float, alpha: float = 0.05) -> float:
    """The chance that mid-p McNemar rejects, given the chances that an example is right for `a` alone or `b` alone.

    Exact: summed over how many examples could be discordant.
    """
    from scipy.special import bdtr

    rate = only_a + only_b

    def pmf(k: NDArray[Any], n: ArrayLike, p: float) -> Floats:
        below: Floats = np.where(k > 0, bdtr(k - 1.0, np.asarray(n), p), 0.0)
        return np.asarray(bdtr(k.astype(float), np.asarray(n), p) - below)

    spread = 8 * math.sqrt(examples * rate * (1 - rate)) + 8
    total = 0.0
    for n in range(max(1, int(examples * rate - spread)), min(examples, int(examples * rate + spread)) + 1):
        k = np.arange(n + 1)
        rejected = _mid_p(k, n - k) <= alpha
        total += float(pmf(np.array([n]), examples, rate)[0] * pmf(k, n, only_a / rate)[rejected].sum())
    return total


# -- distributions --


def _mid_p(only_a: NDArray[Any], only_b: NDArray[Any]) -> Floats:
    from scipy.special import bdtr

    fewer, n = np.minimum(only_a, only_b).astype(float), (only_a + only_b).astype(int)
    up_to = bdtr(fewer, n, 0.5)
    below = np.where(fewer > 0, bdtr(np.maximum(fewer - 1, 0), n, 0.5), 0.0)
    return np.asarray(np.minimum(1.0, up_to + below))  # 2 P(X < fewer) + P(X = fewer)


def _t_comparison(
    measure: str, difference: float, error: float, degrees: float, confidence: float, seeds: int, examples: int
) -> Comparison:
    from scipy.special import stdtr

    half = _t_quantile((1 + confidence) / 2, degrees) * error
    p = 2 * float(stdtr(degrees, -abs(difference) / error)) if error else float(difference == 0)
    return Comparison(measure, difference, difference - half, difference + half, p, error, degrees, seeds, examples)


def _t_quantile(probability: float, degrees: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))
