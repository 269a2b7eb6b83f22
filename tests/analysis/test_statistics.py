"""Every statistic against a reference or a closed form, and how often the tests reject what is there or is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score, matthews_corrcoef

from lora_bench.analysis import statistics
from lora_bench.analysis.bootstrap import paired_bootstrap
from lora_bench.config.metric_names import MAIN_METRICS
from lora_bench.evaluation import confusion


def draw_predictions(seed: int, n: int = 400, seeds: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    a, b = (y ^ (rng.random((seeds, n)) < error) for error in (0.15, 0.2))
    return y, a, b


def test_measures_are_those_of_scikit_learn_for_many_at_once() -> None:
    y, a, _ = draw_predictions(0)
    counts = confusion.confusion_counts(y, a)
    assert confusion.compute_metric(counts, "mcc") == pytest.approx([matthews_corrcoef(y, p) for p in a])
    assert confusion.compute_metric(counts, "f1") == pytest.approx([f1_score(y, p) for p in a])
    assert confusion.compute_metric(counts, "accuracy") == pytest.approx((a == y).mean(1))
    assert confusion.compute_metric([0, 0, 10, 20], "mcc") == 0


@pytest.mark.parametrize("measure", MAIN_METRICS)
def test_influence_is_the_derivative_and_has_mean_zero(measure: str) -> None:
    counts = np.array([60.0, 20.0, 30.0, 90.0])
    h = 1e-5
    numeric = [
        counts.sum()
        * (confusion.compute_metric(counts + h * e, measure) - confusion.compute_metric(counts - h * e, measure))
        / (2 * h)
        for e in np.eye(4)
    ]
    result = confusion.influence(counts, measure)
    assert result == pytest.approx(numeric, abs=1e-6)
    assert (counts * result).sum() == pytest.approx(0, abs=1e-9)


def test_the_interval_is_scipys_and_one_value_has_none() -> None:
    x = [0.5, 0.53, 0.49, 0.55]
    result = statistics.interval(x)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(x), scipy.stats.sem(x))
    assert (result.low, result.high) == pytest.approx((low, high))
    assert statistics.interval([0.5]) == statistics.Interval(0.5, None, None, None, 1)
    assert statistics.interval([0.5, 0.5]) == statistics.Interval(0.5, 0.0, None, None, 2)
    assert statistics.interval([0.7] * 3).low is None  # their standard deviation is a rounding error


def test_the_seeds_test_is_scipys_paired_t_test() -> None:
    a, b = [0.6, 0.62, 0.65, 0.61], [0.59, 0.6, 0.66, 0.58]
    assert statistics.seeds_test(a, b).p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)


def test_mid_p_is_the_exact_test_less_half_the_chance_of_what_was_seen() -> None:
    for only_a, only_b in [(0, 0), (5, 5), (3, 12), (0, 7), (40, 61)]:
        a = np.repeat([True, False, True], [only_a, only_b, 10])
        b = np.repeat([False, True, True], [only_a, only_b, 10])
        result = statistics.mcnemar(a, b)
        exact = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        half = scipy.stats.binom.pmf(only_a, only_a + only_b, 0.5)
        assert (result.only_a, result.only_b) == (only_a, only_b)
        assert result.p == pytest.approx(exact - half if only_a != only_b else 1.0)


def test_holm_steps_down_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []


def test_one_seed_of_accuracy_is_the_paired_t_test_over_examples() -> None:
    y, a, b = draw_predictions(1)
    result = statistics.crossed_test(y, a[0], b[0], "accuracy")
    assert result.p == pytest.approx(scipy.stats.ttest_rel((a[0] == y) * 1.0, (b[0] == y) * 1.0).pvalue)
    assert result.seeds == 1


def test_the_crossed_variance_is_that_of_the_two_way_layout() -> None:
    """On accuracy the pseudo-values are the outcomes themselves, so the mean squares are those of a plain ANOVA."""
    y, a, b = draw_predictions(2)
    b[:, :40] = ~y[:40]  # hard for b, whatever the seed
    d = (a == y).astype(float) - (b == y)
    S, N = d.shape
    seed = N * d.mean(1).var(ddof=1)
    example = S * d.mean(0).var(ddof=1)
    rest = ((d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()) ** 2).sum() / ((S - 1) * (N - 1))
    result = statistics.crossed_test(y, a, b, "accuracy")
    assert result.difference == pytest.approx(d.mean())
    assert result.by_seeds == pytest.approx(seed / (S * N))
    assert result.by_examples == pytest.approx((example - rest) / (S * N))
    assert result.error == pytest.approx(math.sqrt((seed + example - rest) / (S * N)))


def test_the_half_width_is_that_over_seeds_and_that_over_examples_in_quadrature() -> None:
    result = comparison(0.02, 0.003**2, 0.004**2, seeds=3, examples=5000)
    over_seeds, over_examples = scipy.stats.t.ppf(0.975, 2) * 0.003, scipy.stats.t.ppf(0.975, 4999) * 0.004
    half = math.hypot(over_seeds, over_examples)
    assert result.interval() == pytest.approx((0.02 - half, 0.02 + half))
    # The p value is the level at which the interval ends at 0.
    low, _ = result.interval(1 - result.p)
    assert low == pytest.approx(0, abs=1e-9)
    assert comparison(half, 0.003**2, 0.004**2, seeds=3, examples=5000).p == pytest.approx(0.05)


def test_where_only_seeds_differ_the_crossed_test_is_the_t_test_over_seeds() -> None:
    y, a, b = draw_predictions(3, n=20_000)
    b = y ^ (np.random.default_rng(4).random((3, 20_000)) < np.array([[0.1], [0.2], [0.3]]))
    values = [confusion.compute_metric(confusion.confusion_counts(y, x)) for x in (a, b)]
    assert statistics.crossed_test(y, a, b).p == pytest.approx(statistics.seeds_test(*values).p, rel=0.05)


def test_equal_predictions_differ_by_nothing() -> None:
    y, a, _ = draw_predictions(5)
    result = statistics.crossed_test(y, a, a)
    assert (result.difference, *result.interval(), result.p) == (0, 0, 0, 1)
    assert (result.p_beyond(0.005), result.power(0.005)) == (0, 1)


def ahead_by_ten(same: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three seeds of 1,000 examples: `a` has 90 wrong and `b` 100, the same examples in each seed or always others."""
    rng = np.random.default_rng(0)
    y = np.arange(1000) % 2 == 0
    wrong = {"a": np.zeros((3, 1000), bool), "b": np.zeros((3, 1000), bool)}
    for s in range(3):
        for name, count in (("a", 45), ("b", 50)):  # of each label
            draw = np.random.default_rng([0, *name.encode()]) if same else rng
            for label in (True, False):
                wrong[name][s, draw.permutation(np.flatnonzero(y == label))[:count]] = True
    return y, y ^ wrong["a"], y ^ wrong["b"]


def test_differences_that_are_equal_in_all_seeds_are_not_certain() -> None:
    y, a, b = ahead_by_ten(same=False)
    values = [confusion.compute_metric(confusion.confusion_counts(y, x)) for x in (a, b)]
    assert statistics.all_equal(values[0] - values[1])
    result = statistics.crossed_test(y, a, b)
    # What one seed's 190 answers that differ would spread by, by hand: MCC is 1 - 2 · wrong / N in this layout.
    assert math.sqrt(result.by_seeds * 3) == pytest.approx(2 * math.sqrt(190) / 1000, rel=0.1)
    assert result.p > 0.2
    assert statistics.choose_verdict(result.difference, result.p, result.p_beyond(0.01)) == "inconclusive"
    same = statistics.crossed_test(*ahead_by_ten(same=True))  # the seed changed no answer: the examples still count
    assert same.by_seeds == pytest.approx(0, abs=1e-15)
    assert same.error == pytest.approx(statistics.crossed_test(y, *(x[0] for x in ahead_by_ten(same=True)[1:])).error)
    assert same.p > 0.2


def test_the_bootstrap_spreads_as_the_influences_say() -> None:
    y, a, b = draw_predictions(6, n=3000)
    bootstrap, exact = paired_bootstrap(y, a[0], b[0]), statistics.crossed_test(y, a[0], b[0])
    assert bootstrap.difference == pytest.approx(exact.difference)
    assert bootstrap.error == pytest.approx(exact.error, rel=0.03)
    assert (bootstrap.low, bootstrap.high) == pytest.approx(exact.interval(), abs=0.2 * exact.error)


def test_effect_size_is_d_z_with_hedges_correction() -> None:
    d = np.array([0.01, 0.02, 0.03])
    assert statistics.effect_size(d) == pytest.approx(2.0 * (1 - 3 / 7))
    assert statistics.effect_size([0.01]) is None


def comparison(
    difference: float, by_seeds: float = 0.0, by_examples: float = 0.0, seeds: int = 1, examples: int = 10**6
) -> statistics.Comparison:
    return statistics.Comparison("mcc", difference, by_seeds, by_examples, seeds, examples)


def test_p_values_reach_into_the_tails() -> None:
    assert comparison(0.0, by_examples=1e-6).p == 1
    assert comparison(0.01, by_examples=1e-6).p == pytest.approx(2 * scipy.stats.t.sf(10, 10**6 - 1), rel=1e-6)
    assert comparison(1.0, by_examples=1e-9).p == 0
    assert comparison(0.01, by_seeds=1e-6, seeds=4, examples=0).p == pytest.approx(2 * scipy.stats.t.sf(10, 3))


def test_two_one_sided_tests_of_the_margin() -> None:
    near, far = comparison(0.002, by_examples=0.004**2), comparison(0.013, by_examples=0.004**2)
    assert near.p_beyond(0.01) == pytest.approx(scipy.stats.norm.sf(2), rel=1e-4)
    assert far.p_beyond(0.01) == pytest.approx(1 - scipy.stats.norm.sf(0.75), rel=1e-4)


def test_verdicts() -> None:
    assert statistics.choose_verdict(0.02, 0.001, 0.9) == "better"
    assert statistics.choose_verdict(-0.02, 0.05, 0.01) == "worse"
    assert statistics.choose_verdict(0.02, 0.2, 0.04) == "equivalent"
    assert statistics.choose_verdict(0.02, 0.2, 0.3) == "inconclusive"


def test_power_is_that_of_the_normal_test_and_detectable_inverts_it() -> None:
    result = comparison(0.0, by_examples=0.004**2)
    z = 1.959964
    theory = scipy.stats.norm.sf(z - 2.5) + scipy.stats.norm.cdf(-z - 2.5)
    assert result.power(0.01) == pytest.approx(theory, abs=1e-4)
    assert result.detectable() == pytest.approx(0.004 * (z + 0.841621), rel=1e-3)
    assert result.power(result.detectable()) == pytest.approx(0.8)
    assert comparison(0.0).power(0.01) == 1


def test_power_over_seeds_is_that_of_the_t_test() -> None:
    result = comparison(0.0, by_seeds=0.004**2, seeds=5, examples=0)
    critical = scipy.stats.t.ppf(0.975, 4)
    theory = scipy.stats.nct.sf(critical, 4, 2.5) + scipy.stats.nct.cdf(-critical, 4, 2.5)
    assert result.power(0.01) == pytest.approx(theory, abs=1e-3)


# -- the variance over seeds, pooled over methods --


def by_seed(values: np.ndarray) -> list[dict[str, float]]:
    return [{str(i): float(x) for i, x in enumerate(row)} for row in values]


def test_the_pool_of_two_methods_is_the_variance_of_their_difference() -> None:
    values = np.random.default_rng(1).normal(size=(2, 3))
    pool = statistics.pool_seed_variance(by_seed(values))
    assert pool is not None
    assert pool.degrees == 2
    assert 2 * pool.variance == pytest.approx((values[0] - values[1]).var(ddof=1))


def test_the_pool_is_the_mean_square_of_methods_by_seeds() -> None:
    values = np.random.default_rng(2).normal(size=(4, 3))
    residuals = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    pool = statistics.pool_seed_variance(by_seed(values))
    assert pool is not None
    assert (pool.variance, pool.degrees) == (pytest.approx((residuals**2).sum() / 6), 6)
    # What a seed does to all methods alike does not count.
    shifted = statistics.pool_seed_variance(by_seed(values + np.array([0.0, 10.0, -5.0])))
    assert shifted == statistics.SeedVariance(pytest.approx(pool.variance), 6)  # type: ignore[arg-type]


def test_methods_may_have_different_seeds() -> None:
    values = by_seed(np.random.default_rng(3).normal(size=(3, 4)))
    del values[0]["3"], values[2]["0"]
    pool = statistics.pool_seed_variance(values)
    assert pool is not None
    assert pool.degrees == 10 - 3 - 4 + 1
    assert statistics.pool_seed_variance([{"0": 0.5}, {"0": 0.6}]) is None
    apart = statistics.pool_seed_variance([{"0": 0.5, "1": 0.6}, {"2": 0.6, "3": 0.5}])
    assert apart is None  # no method shares a seed with another, so a seed's luck cannot be separated


def test_a_comparison_takes_the_pooled_variance_and_its_degrees() -> None:
    own = comparison(0.02, 0.003**2, 0.004**2, seeds=3, examples=5000)
    pooled = own.with_pooled_seeds(statistics.SeedVariance(6e-6, 6))
    assert pooled.by_seeds == pytest.approx(2 * 6e-6 / 3)
    half = math.hypot(scipy.stats.t.ppf(0.975, 6) * 0.002, scipy.stats.t.ppf(0.975, 4999) * 0.004)
    assert pooled.half_width() == pytest.approx(half)
    assert (own.degrees, pooled.degrees, pooled.rescaled(5, 5000).degrees) == (2, 6, 12)
    assert own.with_pooled_seeds(statistics.SeedVariance(0.0, 6)) == own
    one_seed = comparison(0.02, by_examples=0.004**2)
    assert one_seed.with_pooled_seeds(statistics.SeedVariance(6e-6, 6)) == one_seed


def test_power_with_a_pool_is_that_of_the_t_test_with_its_degrees() -> None:
    result = comparison(0.0, seeds=3, examples=0).with_pooled_seeds(statistics.SeedVariance(1.5 * 0.004**2, 6))
    critical = scipy.stats.t.ppf(0.975, 6)
    theory = scipy.stats.nct.sf(critical, 6, 2.5) + scipy.stats.nct.cdf(-critical, 6, 2.5)
    assert result.power(0.01) == pytest.approx(theory, abs=1e-3)


@pytest.mark.parametrize(("noisy", "at_most"), [(None, 0.05), (1, 0.1), (0, 0.1)])
def test_the_pooled_test_keeps_its_size_and_nearly_so_if_a_method_varies_more(
    noisy: int | None, at_most: float
) -> None:
    """20,000 comparisons of 4 methods with 3 seeds: any false rejection after Holm, at most 5 % if all vary alike."""
    rng = np.random.default_rng(5)
    spread = np.ones((1, 4, 1))
    if noisy is not None:
        spread[0, noisy] = 3
    values = spread * rng.normal(size=(20_000, 4, 3))
    by_examples = 0.32
    means = values.mean(2) + math.sqrt(by_examples / 2) * rng.normal(size=(20_000, 4))
    residuals = (
        values - values.mean(2, keepdims=True) - values.mean(1, keepdims=True) + values.mean((1, 2))[:, None, None]
    )
    variances = (residuals**2).sum((1, 2)) / 6
    largest = np.abs(means[:, 1:] - means[:, :1]).max(1)
    # Holm rejects anything if and only if the largest difference is significant at a third of the level.
    over_seeds, over_examples = scipy.stats.t.isf(0.05 / 6, 6), scipy.stats.norm.isf(0.05 / 6)
    limits = np.sqrt(over_seeds**2 * 2 * variances / 3 + over_examples**2 * by_examples)
    pooled = comparison(0, 1.0, by_examples, 3).with_pooled_seeds(statistics.SeedVariance(float(variances[0]), 6))
    assert pooled.half_width(0.05 / 3) == pytest.approx(limits[0], rel=1e-4)
    assert 0.01 <= (largest > limits).mean() <= at_most


@pytest.mark.parametrize("S", [2, 3, 5])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_the_test_keeps_its_size_whatever_share_the_seeds_have(S: int, share: float) -> None:
    """20,000 differences and variances drawn as they come about: a standard error of 0.15 % at 5 %."""
    rng = np.random.default_rng(8)
    difference = rng.normal(0, 1, 20_000)
    by_seeds = share * rng.chisquare(S - 1, 20_000) / (S - 1)
    critical = np.array([comparison(0, v, 1 - share, S, 5000).half_width() for v in by_seeds[:2000]])
    # P(|difference| > critical) for each variance, exactly: no noise but that of the variances.
    rejected = 2 * scipy.stats.norm.sf(critical).mean()
    assert 0.005 <= rejected <= 0.053
    assert difference.std() == pytest.approx(1, abs=0.02)


def simulated(
    rng: np.random.Generator, S: int, spread: float, by_example: float, gain: float = 0.0
) -> statistics.Comparison:
    """Two methods over 1,000 examples: hard ones for all, hard ones for a method, better and worse seeds."""
    y = rng.random(1000) < 0.37
    ease = rng.normal(3.0, 2.3, 1000)
    predicted = []
    for lift in (gain, 0.0):
        result = (
            ease
            + by_example * rng.normal(size=1000)
            + 0.7 * rng.normal(size=(S, 1000))
            + spread * rng.normal(size=(S, 1))
        )
        predicted.append(y ^ (result + lift < 0))
    return statistics.crossed_test(y, *predicted)


@pytest.mark.parametrize(("S", "spread", "by_example"), [(3, 0.0, 0.7), (3, 0.2, 0.7), (2, 0.2, 0.0), (5, 0.1, 0.7)])
def test_under_no_difference_the_crossed_test_keeps_its_size(S: int, spread: float, by_example: float) -> None:
    """400 comparisons: 5 % has a standard error of 1.1 %; experiments/simulate_tests.py has 2,000 comparisons."""
    rng = np.random.default_rng(8)
    assert np.mean([simulated(rng, S, spread, by_example).p <= 0.05 for _ in range(400)]) <= 0.06


def test_a_difference_is_found_with_the_power_that_theory_gives() -> None:
    rng = np.random.default_rng(9)
    comparisons = [simulated(rng, 3, 0.05, 0.7, gain=0.4) for _ in range(400)]
    truth = float(np.mean([result.difference for result in comparisons]))
    typical = comparison(
        0.0,
        float(np.mean([x.by_seeds for x in comparisons])),
        float(np.mean([x.by_examples for x in comparisons])),
        3,
        1000,
    )
    assert 0.3 < typical.power(truth) < 0.95
    assert np.mean([x.p <= 0.05 for x in comparisons]) == pytest.approx(typical.power(truth), abs=0.07)


def test_mcnemar_rejects_as_often_as_it_should_and_finds_what_theory_says() -> None:
    rng = np.random.default_rng(9)

    def rejects(only_a: float, only_b: float) -> float:
        draws = rng.multinomial(5000, [only_a, only_b, 1 - only_a - only_b], size=2000)
        return float((statistics._mid_p(draws[:, 0], draws[:, 1]) <= 0.05).mean())

    assert rejects(0.04, 0.04) == pytest.approx(0.05, abs=0.01)
    assert statistics.mcnemar_power(100, 0.0, 0.0) == 0.0
    assert rejects(0.045, 0.035) == pytest.approx(statistics.mcnemar_power(5000, 0.045, 0.035), abs=0.03)


def test_an_undecided_comparison_is_told_to_run_more_than_it_has() -> None:
    test = statistics.Comparison("mcc", 0.0055, 1e-5, 0.0, 10, 1000)
    assert test.power(0.01) >= 0.8
    assert (test.seeds_needed(0.01), statistics.deciding_difference(0.0055, 0.01)) == (11, 0.0055)
    assert statistics.deciding_difference(-0.002, 0.01) == pytest.approx(0.008)
    assert statistics.deciding_difference(0.02, 0.01) == 0.02
    fixed = statistics.Comparison("mcc", 0.0055, 0.0, 1e-6, 1, 300)
    assert (fixed.examples_needed(0.01) or 0) > 300


def test_without_any_spread_few_examples_exclude_nothing() -> None:
    assert not statistics.Comparison("accuracy", 0.0, 0.0, 0.0, 3, 299).can_exclude(0.01)
    assert statistics.Comparison("accuracy", 0.0, 0.0, 0.0, 3, 300).can_exclude(0.01)
    assert statistics.Comparison("accuracy", 0.0, 0.0, 1e-9, 3, 8).can_exclude(0.01)


def test_a_comparison_of_many_seeds_is_not_told_to_run_fewer() -> None:
    test = statistics.Comparison("mcc", 0.01, 1e-6, 4e-5, statistics.MAX_SEEDS + 16, 1000)
    assert test.seeds_needed(0.01) is None
    needed = test.examples_needed(0.01)
    assert needed is not None
    assert test.rescaled(test.seeds, needed).power(0.01) >= 0.8
    assert test.rescaled(test.seeds, int(needed / 1.4)).power(0.01) < 0.8
