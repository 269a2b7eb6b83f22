"""Statistics of a comparison: intervals, paired tests, corrections, power. Pure functions that import scipy late.

Two sources of chance matter when two methods are compared: the seeds they were trained with and the examples they were
scored on. A t test over seeds takes the examples as fixed; a bootstrap (`bootstrap`) or McNemar's test over examples
takes the trained models as fixed. `crossed_test` counts both and decides the verdicts of `compare`. The others are
customary in the field and reported beside it.

Predictions are classes or numbers, not scores. A difference is `a - b`: above 0, `a` is better.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.evaluation import main_metric

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]

CONFIDENCE = 0.95
"""Default confidence of an interval."""

ROUNDING = 1e-10
"""Differences between metrics below this are rounding errors."""

MAX_SEEDS = 20
"""Largest number of seeds that is proposed."""

VERDICTS = ("better", "worse", "equivalent", "inconclusive")
"""Words that `choose_verdict` returns."""


@dataclass(frozen=True)
class Interval:
    """The mean of `n` values, their sample standard deviation, and its bounds; None where no spread shows."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    n: int


def interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """Return Student's t interval for the mean of values over seeds."""
    x = np.asarray(values, float)
    return interval_from_std(float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else None, len(x), confidence)


def interval_from_std(mean: float, std: float | None, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Student's t interval from the mean, the sample standard deviation and the number of values."""
    if std is None or std < ROUNDING:
        return Interval(mean, std, None, None, n)
    half = _t_quantile((1 - confidence) / 2, n - 1) * std / math.sqrt(n)
    return Interval(mean, std, mean - half, mean + half, n)


def all_equal(values: ArrayLike) -> bool:
    """Return whether values over seeds show no spread: they are equal up to rounding."""
    return float(np.ptp(np.asarray(values, float))) < ROUNDING


@dataclass(frozen=True)
class Comparison:
    """A difference `a - b` with the two terms of its variance: from seeds and from examples."""

    measure: str
    difference: float
    by_seeds: float
    """Variance of the difference as it shows between seeds; 0 for one seed, which cannot show any."""
    by_examples: float
    """Variance that remains: some examples favour `a` with every seed."""
    seeds: int
    examples: int
    """Number of examples; 0 if they are taken as fixed."""
    seed_degrees: int | None = None
    """Degrees of freedom of `by_seeds`; None for the `seeds - 1` of a variance that is not pooled."""

    @property
    def degrees(self) -> int:
        """Degrees of freedom of `by_seeds`."""
        return self.seeds - 1 if self.seed_degrees is None else self.seed_degrees

    @property
    def error(self) -> float:
        """Standard error of the difference."""
        return math.sqrt(self.by_seeds + self.by_examples)

    def can_exclude(self, difference: float) -> bool:
        """Return whether the comparison says anything about a true `difference`.

        Where no spread shows, neither over seeds nor over examples, the error is 0 however few examples there are. Then
        up to 3 / N of all examples may differ (95 % bound of a share of which N examples show none, Hanley &
        Lippman-Hand 1983).
        """
        return self.error > 0 or difference * self.examples >= 3

    @property
    def p(self) -> float:
        """Two-sided p value of no difference."""
        return self._p(abs(self.difference))

    def half_width(self, alpha: float = 1 - CONFIDENCE) -> float:
        """Return half of the interval that contains the true difference with probability 1 - alpha or more.

        The half-widths over seeds and over examples are added in quadrature. Banerjee (1960) proved that such an
        interval never covers less than it claims, whatever the two variances are.
        """
        return math.sqrt(float(self._squared(self.by_seeds, alpha)))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the bounds of the interval of the difference."""
        half = self.half_width(1 - confidence)
        return self.difference - half, self.difference + half

    def p_beyond(self, margin: float) -> float:
        """Return the p value of a true difference of `margin` or more (Schuirmann 1987, two one-sided tests)."""
        nearer = margin - abs(self.difference)
        half = self._p(abs(nearer)) / 2
        return half if nearer > 0 else 1 - half

    def power(self, difference: float, alpha: float = 0.05) -> float:
        """Return the probability of detecting a true `difference`, with the two variances taken as the true ones."""
        from scipy.special import chdtri, ndtr

        if not self.error:
            return 1.0 if difference else alpha
        estimated = np.array([self.by_seeds])
        if self.seeds > 1:  # the estimated variance over seeds varies: integrate over its chi-squared distribution
            ranks = (np.arange(1000) + 0.5) / 1000
            estimated = self.by_seeds * chdtri(self.degrees, ranks) / self.degrees
        critical, shift = np.sqrt(self._squared(estimated, alpha)), abs(difference)
        detected = ndtr((shift - critical) / self.error) + ndtr((-shift - critical) / self.error)
        return float(detected.mean())

    def detectable(self, chance: float = 0.8, alpha: float = 0.05) -> float:
        """Return the smallest true difference that such a comparison detects with a probability of `chance`."""
        if not self.error:
            return 0.0
        high = self.error
        while self.power(high, alpha) < chance:
            high *= 2
        return _find_zero(lambda difference: self.power(difference, alpha) - chance, 0.0, high)

    def rescaled(self, seeds: int, examples: int) -> Comparison:
        """Return the comparison that is to be expected with another number of seeds and examples.

        The variance over seeds falls with the number of seeds, the variance over examples with that of examples. The
        part of the former that comes from the examples falls with both; it is not counted, so this is conservative.
        Pooled degrees of freedom grow with the number of seeds.
        """
        by_examples = self.by_examples * self.examples / examples if examples else self.by_examples
        by_seeds = self.by_seeds * self.seeds / seeds
        degrees = None if self.seed_degrees is None else self.seed_degrees * (seeds - 1) // (self.seeds - 1)
        return Comparison(self.measure, self.difference, by_seeds, by_examples, seeds, examples, degrees)

    def with_pooled_seeds(self, pool: SeedVariance) -> Comparison:
        """Return the comparison of two methods of the pool with the pooled variance over seeds.

        The comparison itself is returned if it has one seed, or the pool shows no spread.
        """
        if self.seeds < 2 or not pool.variance:
            return self
        return replace(self, by_seeds=2 * pool.variance / self.seeds, seed_degrees=pool.degrees)

    def seeds_needed(self, difference: float, alpha: float = 0.05, chance: float = 0.8) -> int | None:
        """Return the smallest number of seeds that detects a true `difference` with probability `chance`.

        It is above the comparison's own number of seeds. For a comparison of one seed the variance from seeds counts as
        0. None if `MAX_SEEDS` seeds do not suffice, for example because the examples are too few.
        """
        counts = range(self.seeds + 1, MAX_SEEDS + 1)
        return next((n for n in counts if self.rescaled(n, self.examples).power(difference, alpha) >= chance), None)

    def examples_needed(self, difference: float, alpha: float = 0.05, chance: float = 0.8) -> int | None:
        """Return the number of examples, to two digits, that do so with `MAX_SEEDS` seeds; None if none does.

        It is above the comparison's own number of examples. A comparison of more seeds keeps them.
        """
        n = 1.25 * max(self.examples, 2)
        for _ in range(60):
            if self.rescaled(max(MAX_SEEDS, self.seeds), int(n)).power(difference, alpha) >= chance:
                step = 10 ** (len(str(int(n))) - 2) if n >= 10 else 1
                return math.ceil(n / step) * step
            n *= 1.25
        return None

    def _squared(self, by_seeds: ArrayLike, alpha: float) -> Floats:
        """Return the squared half-width of the interval at a level, for variances over seeds."""
        over_seeds = _t_quantile(alpha / 2, self.degrees) if self.seeds > 1 else 0.0
        over_examples = _t_quantile(alpha / 2, self.examples - 1) if self.examples > 1 else 0.0
        return np.asarray(over_seeds**2 * np.asarray(by_seeds) + over_examples**2 * self.by_examples)

    def _p(self, distance: float) -> float:
        """Return the level at which the interval is as wide as `distance` on each side."""
        if not self.error:
            return float(distance == 0)
        smallest = -300.0  # log p; a smaller p counts as 0
        if distance == 0 or self.half_width(math.exp(smallest)) <= distance:
            return float(distance == 0)
        return math.exp(_find_zero(lambda log_p: distance - self.half_width(math.exp(log_p)), smallest, 0.0))


@dataclass(frozen=True)
class SeedVariance:
    """The variance of one method's metric over seeds, without what a seed does to all methods alike."""

    variance: float
    degrees: int


@dataclass(frozen=True)
class McNemar:
    """The number of examples that only one of two models predicts correctly, for each model, and the mid-p value."""

    only_a: int
    only_b: int
    p: float


def crossed_test(labels: ArrayLike, predicted_a: ArrayLike, predicted_b: ArrayLike, measure: str = "mcc") -> Comparison:
    """Test whether `a` differs from `b`, with seeds and examples as two crossed sources of chance.

    Each of S paired seeds scores the same N examples, as readers do in a multi-reader multi-case study. The pseudo-
    values d[s, i] = difference of seed s + influence of example i on it follow a two-way random layout, whose mean
    squares give Var(d..) = (MS_seed + max(MS_example - MS_rest, 0)) / (S N) (Dorfman, Berbaum & Metz 1992). Their
    single t with Satterthwaite's degrees of freedom rejects up to 7 % of equal methods with three seeds and 13 % with
    two. Therefore each term has its own t here, see `Comparison.half_width`. Where seeds differ much, the test is the
    paired t test over seeds; with one seed (`seeds` is 1) only the examples are counted. `pool_seed_variance` gives the
    first term more degrees of freedom where more than two methods are compared.

    Differences that are equal in all seeds do not prove that there is no spread, because counts are whole numbers. Then
    MS_rest replaces MS_seed, as if seeds were equal and only examples varied.

    Args:
        labels: (N,) classes 0, 1, …, or numbers.
        predicted_a: (S, N), or (N,) for one seed: the classes or numbers that each seed's model predicts. Row s of both
            is the same seed.
        predicted_b: the predictions of the rival, in the same shape.
        measure: one of `ALL_MAIN_METRICS`.
    """
    a, b = (main_metric.pseudo_values(labels, np.atleast_2d(x), measure) for x in (predicted_a, predicted_b))
    pseudo = a - b  # (S, N)
    S, N = pseudo.shape
    by_seed, by_example, mean = pseudo.mean(1), pseudo.mean(0), float(pseudo.mean())
    squares = float(((by_example - mean) ** 2).sum())
    if S == 1:
        return Comparison(measure, mean, 0.0, squares / max(N - 1, 1) / N, S, N)
    of_seeds = N * float(((by_seed - mean) ** 2).sum())
    ms_example = S * squares / max(N - 1, 1)
    ms_rest = max(0.0, float(((pseudo - mean) ** 2).sum()) - of_seeds - S * squares) / ((S - 1) * max(N - 1, 1))
    ms_seed = ms_rest if all_equal(by_seed) else of_seeds / (S - 1)
    return Comparison(measure, mean, ms_seed / (S * N), max(0.0, ms_example - ms_rest) / (S * N), S, N)


def pool_seed_variance(values: Sequence[Mapping[str, float]]) -> SeedVariance | None:
    """Return the variance over seeds that several methods share, from the residuals of method + seed.

    Three seeds give the difference of two methods two degrees of freedom: its variance often looks too small by chance,
    and the quantile of Student's t is 4.3 in place of 2. Multi-reader studies therefore pool the mean square of methods
    by readers over all T methods that they compare: MS_TR = sum (x_ts - x_t. - x_.s + x_..)^2 / ((T - 1)(S - 1)), and
    2 MS_TR / S is the variance of a difference as it shows between S seeds (Dorfman, Berbaum & Metz 1992; Obuchowski &
    Rockette 1995; Hillis 2007). For two methods it is the variance of their difference alone.

    This takes for granted that methods spread alike over seeds. experiments/simulate_sweeps.py shows what happens
    otherwise.

    Args:
        values: the metric of each method, by seed. Methods may have different seeds.

    Returns:
        None if no degrees of freedom remain.
    """
    seeds = list(dict.fromkeys(seed for by_seed in values for seed in by_seed))
    cells = [(method, seeds.index(seed), x) for method, by_seed in enumerate(values) for seed, x in by_seed.items()]
    design = np.zeros((len(cells), len(values) + len(seeds)))
    for i, (method, seed, _) in enumerate(cells):
        design[i, [method, len(values) + seed]] = 1
    metric = np.array([x for *_, x in cells])
    effects, _, rank, _ = np.linalg.lstsq(design, metric, rcond=None)
    degrees = len(cells) - int(rank)
    residuals = metric - design @ effects
    if degrees < 1:
        return None
    return SeedVariance(0.0 if all_equal([*residuals, 0.0]) else float(residuals @ residuals) / degrees, degrees)


def seeds_test(values_a: ArrayLike, values_b: ArrayLike) -> Comparison:
    """Return the paired t test over seeds (at least two), which takes the examples as fixed."""
    d = np.asarray(values_a, float) - np.asarray(values_b, float)
    return Comparison("seeds", float(d.mean()), float(d.var(ddof=1)) / len(d), 0.0, len(d), 0)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """Return McNemar's test with the mid-p value (Fagerland et al. 2013); the exact one is conservative.

    Args:
        correct_a: (N,) whether `a` predicts each example correctly.
        correct_b: (N,) whether `b` does.
    """
    a, b = np.asarray(correct_a, bool), np.asarray(correct_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_a, only_b, float(_mid_p(np.array([only_a]), np.array([only_b]))[0]))


def effect_size(differences: ArrayLike) -> float | None:
    """Return the standardised mean of paired differences over seeds: Cohen's d_z with Hedges' correction.

    None for fewer than three seeds, for which the correction is not defined, and where all differences are equal.
    """
    d = np.asarray(differences, float)
    return None if len(d) < 3 or all_equal(d) else float(d.mean() / d.std(ddof=1) * (1 - 3 / (4 * (len(d) - 1) - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm (1979).

    If those at most alpha are rejected, the probability of one false rejection among all is at most alpha.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def choose_verdict(difference: float, p: float, p_beyond: float, alpha: float = 0.05) -> str:
    """Return one of `VERDICTS` for p values, adjusted if there were several rivals.

    `better` or `worse` if the difference is significant; else `equivalent` if it is significantly within the margin of
    `p_beyond`; else `inconclusive`: the comparison was too small to decide.
    """
    if p <= alpha:
        return "better" if difference > 0 else "worse"
    return "equivalent" if p_beyond <= alpha else "inconclusive"


def deciding_difference(difference: float, margin: float) -> float:
    """Return the difference that has to be detected to decide an inconclusive comparison.

    It is the observed difference, or what lies between it and the margin if that is more.
    """
    return max(abs(difference), margin - abs(difference))


def mcnemar_power(examples: int, only_a: float, only_b: float, alpha: float = 0.05) -> float:
    """Return the probability that mid-p McNemar rejects, summed exactly over the number of discordant examples.

    Args:
        examples: number of examples.
        only_a: probability that only `a` predicts an example correctly.
        only_b: probability that only `b` does.
        alpha: level of the test.
    """
    from scipy.special import bdtr

    rate = only_a + only_b
    if not rate:
        return 0.0

    def pmf(k: NDArray[Any], n: ArrayLike, p: float) -> Floats:
        below: Floats = np.where(k > 0, bdtr(k - 1.0, np.asarray(n), p), 0.0)
        return np.asarray(bdtr(k.astype(float), np.asarray(n), p) - below)

    window = 8 * math.sqrt(examples * rate * (1 - rate)) + 8
    total = 0.0
    for n in range(max(1, int(examples * rate - window)), min(examples, int(examples * rate + window)) + 1):
        k = np.arange(n + 1)
        rejected = _mid_p(k, n - k) <= alpha
        total += float(pmf(np.array([n]), examples, rate)[0] * pmf(k, n, only_a / rate)[rejected].sum())
    return total


def _mid_p(only_a: NDArray[Any], only_b: NDArray[Any]) -> Floats:
    """Return the mid-p values of McNemar's test for discordant counts."""
    from scipy.special import bdtr

    fewer, n = np.minimum(only_a, only_b).astype(float), (only_a + only_b).astype(int)
    cumulative = bdtr(fewer, n, 0.5)
    below = np.where(fewer > 0, bdtr(np.maximum(fewer - 1, 0), n, 0.5), 0.0)
    return np.asarray(np.minimum(1.0, cumulative + below))  # 2 P(X < fewer) + P(X = fewer)


def _t_quantile(tail: float, degrees: float) -> float:
    """Return the value that Student's t exceeds with probability `tail`."""
    from scipy.special import stdtrit

    return -float(stdtrit(degrees, tail))


def _find_zero(rises: Callable[[float], float], low: float, high: float) -> float:
    """Return the point between `low` and `high` where a rising function crosses 0.

    Twelve bisections leave a range in which the function is nearly a line. Secants between points on both sides, with
    the Illinois rule (Dowell & Jarratt 1971), then end after a few steps.
    """
    for _ in range(12):
        point = (low + high) / 2
        low, high = (point, high) if rises(point) < 0 else (low, point)
    at_low, at_high, last_side = rises(low), rises(high), 0
    point = high
    for _ in range(50):
        if not at_low < 0 < at_high:
            break
        previous, point = point, (low * at_high - high * at_low) / (at_high - at_low)
        value = rises(point)
        if value == 0 or abs(point - previous) <= 1e-12 * max(1.0, abs(point)):
            break
        side = 1 if value > 0 else -1
        if side > 0:
            high, at_high, at_low = point, value, at_low / (2 if side == last_side else 1)
        else:
            low, at_low, at_high = point, value, at_high / (2 if side == last_side else 1)
        last_side = side
    return point
