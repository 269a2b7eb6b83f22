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

from lora_bench.evaluation.confusion import compute_metric, confusion_counts, influence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = 0.95


VERDICTS = ("better", "worse", "indistinguishable", "undecided")


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values, sample standard deviation, bounds of the mean; None: what no spread can tell."""

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
    if not std:
        return Interval(mean, std, None, None, n)
    half = _t_quantile((1 - confidence) / 2, n - 1) * std / math.sqrt(n)
    return Interval(mean, std, mean - half, mean + half, n)


def alike(values: ArrayLike) -> bool:
    """Whether values over seeds show no spread: they are equal but for rounding."""
    return float(np.ptp(np.asarray(values, float))) < 1e-10


@dataclass(frozen=True)
class Comparison:
    """A difference `a - b` and the two parts of its variance: what the seeds add and what the examples add."""

    measure: str
    difference: float
    by_seeds: float
    """Variance of the difference as it shows between seeds; 0 for one seed, which cannot show any."""
    by_examples: float
    """What that leaves out: some examples favour `a` whatever the seed."""
    seeds: int
    examples: int
    """0: taken for granted."""

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        return math.sqrt(self.by_seeds + self.by_examples)

    @property
    def p(self) -> float:
        """Two-sided p value of no difference."""
        return self._p(abs(self.difference))

    def half_width(self, alpha: float = 1 - CONFIDENCE) -> float:
        """Half of the interval that holds the true difference with probability 1 - alpha or more.

        The half-widths over seeds and over examples, in quadrature: Banerjee (1960) proved that such an interval never
        covers less than it says, whatever the two variances are.
        """
        return math.sqrt(float(self._squared(self.by_seeds, alpha)))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        half = self.half_width(1 - confidence)
        return self.difference - half, self.difference + half

    def p_beyond(self, margin: float) -> float:
        """One-sided p value of a true difference of `margin` or more in size (Schuirmann 1987: two one-sided tests)."""
        nearer = margin - abs(self.difference)
        half = self._p(abs(nearer)) / 2
        return half if nearer > 0 else 1 - half

    def power(self, difference: float, alpha: float = 0.05) -> float:
        """The chance that such a comparison finds a true `difference`, taking the two variances for the true ones."""
        from scipy.special import chdtri, ndtr

        if not self.error:
            return 1.0 if difference else alpha
        estimated = np.array([self.by_seeds])
        if self.seeds > 1:  # the variance over seeds comes out as it happens: over its chi-squared distribution
            ranks = (np.arange(1000) + 0.5) / 1000
            estimated = self.by_seeds * chdtri(self.seeds - 1, ranks) / (self.seeds - 1)
        critical, shift = np.sqrt(self._squared(estimated, alpha)), abs(difference)
        found = ndtr((shift - critical) / self.error) + ndtr((-shift - critical) / self.error)
        return float(found.mean())

    def detectable(self, chance: float = 0.8, alpha: float = 0.05) -> float:
        """The smallest true difference that such a comparison finds with that chance."""
        if not self.error:
            return 0.0
        high = self.error
        while self.power(high, alpha) < chance:
            high *= 2
        return _bisect(lambda difference: self.power(difference, alpha) - chance, 0.0, high)

    def _squared(self, by_seeds: ArrayLike, alpha: float) -> Floats:
        over_seeds = _t_quantile(alpha / 2, self.seeds - 1) if self.seeds > 1 else 0.0
        over_examples = _t_quantile(alpha / 2, self.examples - 1) if self.examples > 1 else 0.0
        return np.asarray(over_seeds**2 * np.asarray(by_seeds) + over_examples**2 * self.by_examples)

    def _p(self, distance: float) -> float:
        """The level at which the interval is as wide as `distance`."""
        if not self.error:
            return float(distance == 0)
        smallest = -300.0  # of log p: what is beyond is 0
        if distance == 0 or self.half_width(math.exp(smallest)) <= distance:
            return float(distance == 0)
        return math.exp(_bisect(lambda log_p: distance - self.half_width(math.exp(log_p)), smallest, 0.0))


@dataclass(frozen=True)
class McNemar:
    """Of the examples that one of two predictions got right alone: how many each, and the mid-p value."""

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Bootstrap:
    """A difference `a - b` with its percentile interval, standard error and two-sided p value over resamples."""

    difference: float
    low: float
    high: float
    p: float
    error: float


def crossed_test(labels: ArrayLike, predicted_a: ArrayLike, predicted_b: ArrayLike, measure: str = "mcc") -> Comparison:
    """Whether `a` beats `b`, with seeds and examples as two crossed sources of chance.

    Each of S paired seeds scores the same N examples, as readers do in a multi-reader multi-case study. The
    pseudo-values d[s, i] = difference of seed s + influence of example i on it follow a two-way random layout, whose
    mean squares give Var(d..) = (MS_seed + max(MS_example - MS_rest, 0)) / (S N) (Dorfman, Berbaum & Metz 1992). Their
    one t with Satterthwaite's degrees of freedom rejects up to 7 % of equal methods with three seeds and 13 % with two;
    so each part has a t of its own here, see `Comparison.half_width`. Where seeds differ much it is the paired t test
    over seeds, and with one seed (`seeds` is 1) only the examples are counted.

    Differences that are equal in all seeds prove no lack of spread: counts are whole numbers. Then MS_rest stands in
    for MS_seed, as if seeds were alike and only examples spread.

    Args:
        labels: (N,) 0 or 1.
        predicted_a: (S, N), or (N,) for one seed: what each seed's model says, row s of both from the same seed.
        predicted_b: the same of the rival.
        measure: accuracy, f1 or mcc.
    """
    y, a, b = np.asarray(labels, bool), *(np.atleast_2d(np.asarray(x, bool)) for x in (predicted_a, predicted_b))
    pseudo = _pseudo_values(y, a, measure) - _pseudo_values(y, b, measure)  # (S, N)
    S, N = pseudo.shape
    by_seed, by_example, mean = pseudo.mean(1), pseudo.mean(0), float(pseudo.mean())
    squares = float(((by_example - mean) ** 2).sum())
    if S == 1:
        return Comparison(measure, mean, 0.0, squares / max(N - 1, 1) / N, S, N)
    of_seeds = N * float(((by_seed - mean) ** 2).sum())
    ms_example = S * squares / max(N - 1, 1)
    ms_rest = max(0.0, float(((pseudo - mean) ** 2).sum()) - of_seeds - S * squares) / ((S - 1) * max(N - 1, 1))
    ms_seed = ms_rest if alike(by_seed) else of_seeds / (S - 1)
    return Comparison(measure, mean, ms_seed / (S * N), max(0.0, ms_example - ms_rest) / (S * N), S, N)


def _pseudo_values(y: NDArray[np.bool_], predicted: NDArray[np.bool_], measure: str) -> Floats:
    counts = confusion_counts(y, predicted)  # (S, 4)
    kind = np.where(predicted, 0, 2) + np.where(y, 0, 1)  # (S, N): tp 0, fp 1, fn 2, tn 3
    added = np.take_along_axis(influence(counts, measure), kind, axis=1)  # (S, N)
    return compute_metric(counts, measure)[:, None] + added


def seeds_test(values_a: ArrayLike, values_b: ArrayLike) -> Comparison:
    """Paired t test over seeds (at least two); the examples are taken for granted."""
    d = np.asarray(values_a, float) - np.asarray(values_b, float)
    return Comparison("seeds", float(d.mean()), float(d.var(ddof=1)) / len(d), 0.0, len(d), 0)


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
) -> Bootstrap:
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
        return compute_metric(of_a, measure) - compute_metric(of_b, measure)

    found, resampled = float(difference(joint)), difference(draws)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p = min(1.0, 2 * (beyond + 1) / (resamples + 1))
    return Bootstrap(found, float(low), float(high), p, float(resampled.std(ddof=1)))


def effect_size(differences: ArrayLike) -> float | None:
    """Standardised mean of paired differences over seeds: Cohen's d_z with Hedges' correction.

    None for fewer than three seeds, where the correction leaves nothing, and where all differences are equal.
    """
    d = np.asarray(differences, float)
    return None if len(d) < 3 or alike(d) else float(d.mean() / d.std(ddof=1) * (1 - 3 / (4 * (len(d) - 1) - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): reject those at most alpha, and one false rejection among all has chance alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def verdict(difference: float, p: float, p_beyond: float, alpha: float = 0.05) -> str:
    """What a comparison says, in one word of `VERDICTS`, from its p values, adjusted if there were several rivals.

    `better` or `worse` where the difference is surely not 0; else `indistinguishable` where it surely lies within the
    margin that `p_beyond` was asked for; else `undecided`: the comparison was too small to tell.
    """
    if p <= alpha:
        return "better" if difference > 0 else "worse"
    return "indistinguishable" if p_beyond <= alpha else "undecided"


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


def _mid_p(only_a: NDArray[Any], only_b: NDArray[Any]) -> Floats:
    from scipy.special import bdtr

    fewer, n = np.minimum(only_a, only_b).astype(float), (only_a + only_b).astype(int)
    up_to = bdtr(fewer, n, 0.5)
    below = np.where(fewer > 0, bdtr(np.maximum(fewer - 1, 0), n, 0.5), 0.0)
    return np.asarray(np.minimum(1.0, up_to + below))  # 2 P(X < fewer) + P(X = fewer)


def _t_quantile(tail: float, degrees: float) -> float:
    """What Student's t exceeds with probability `tail`."""
    from scipy.special import stdtrit

    return -float(stdtrit(degrees, tail))


def _bisect(rises: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function crosses 0 between `low` and `high`."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < 0 else (low, middle)
    return (low + high) / 2
