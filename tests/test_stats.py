"""Every statistic against a reference or a closed form, and how often the tests reject what is there or is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import f1_score, matthews_corrcoef

from lora_bench import stats


def made(seed: int, n: int = 400, seeds: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    a, b = (y ^ (rng.random((seeds, n)) < error) for error in (0.15, 0.2))
    return y, a, b


def test_measures_are_those_of_scikit_learn_for_many_at_once() -> None:
    y, a, _ = made(0)
    counts = stats.confusion(y, a)
    assert stats.measure_of(counts, "mcc") == pytest.approx([matthews_corrcoef(y, p) for p in a])
    assert stats.measure_of(counts, "f1") == pytest.approx([f1_score(y, p) for p in a])
    assert stats.measure_of(counts, "accuracy") == pytest.approx((a == y).mean(1))
    assert stats.measure_of([0, 0, 10, 20], "mcc") == 0


@pytest.mark.parametrize("measure", stats.MEASURES)
def test_influence_is_the_derivative_and_has_mean_zero(measure: str) -> None:
    counts = np.array([60.0, 20.0, 30.0, 90.0])
    h = 1e-5
    numeric = [
        counts.sum() * (stats.measure_of(counts + h * e, measure) - stats.measure_of(counts - h * e, measure)) / (2 * h)
        for e in np.eye(4)
    ]
    found = stats.influence(counts, measure)
    assert found == pytest.approx(numeric, abs=1e-6)
    assert (counts * found).sum() == pytest.approx(0, abs=1e-9)


def test_the_interval_is_scipys_and_one_value_has_none() -> None:
    x = [0.5, 0.53, 0.49, 0.55]
    found = stats.interval(x)
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(x), scipy.stats.sem(x))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert stats.interval([0.5]) == stats.Interval(0.5, None, None, None, 1)


def test_the_seeds_test_is_scipys_paired_t_test() -> None:
    a, b = [0.6, 0.62, 0.65, 0.61], [0.59, 0.6, 0.66, 0.58]
    assert stats.seeds_test(a, b).p == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)


def test_mid_p_is_the_exact_test_less_half_the_chance_of_what_was_seen() -> None:
    for only_a, only_b in [(0, 0), (5, 5), (3, 12), (0, 7), (40, 61)]:
        a = np.repeat([True, False, True], [only_a, only_b, 10])
        b = np.repeat([False, True, True], [only_a, only_b, 10])
        found = stats.mcnemar(a, b)
        exact = scipy.stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
        half = scipy.stats.binom.pmf(only_a, only_a + only_b, 0.5)
        assert (found.only_a, found.only_b) == (only_a, only_b)
        assert found.p == pytest.approx(exact - half if only_a != only_b else 1.0)


def test_holm_steps_down_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


def test_one_seed_of_accuracy_is_the_paired_t_test_over_examples() -> None:
    y, a, b = made(1)
    found = stats.crossed_test(y, a[0], b[0], "accuracy")
    assert found.p == pytest.approx(scipy.stats.ttest_rel((a[0] == y) * 1.0, (b[0] == y) * 1.0).pvalue)
    assert found.seeds == 1


def test_the_crossed_variance_is_that_of_the_two_way_layout() -> None:
    """On accuracy the pseudo-values are the outcomes themselves, so the mean squares are those of a plain ANOVA."""
    y, a, b = made(2)
    d = (a == y).astype(float) - (b == y)
    S, N = d.shape
    seed = N * d.mean(1).var(ddof=1)
    example = S * d.mean(0).var(ddof=1)
    rest = ((d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()) ** 2).sum() / ((S - 1) * (N - 1))
    seed = max(seed, rest)
    total = seed + max(example - rest, 0)
    found = stats.crossed_test(y, a, b, "accuracy")
    assert found.difference == pytest.approx(d.mean())
    assert found.error == pytest.approx(math.sqrt(total / (S * N)))
    assert found.degrees == pytest.approx((S - 1) * (total / seed) ** 2)


def test_where_only_seeds_differ_the_crossed_test_is_the_t_test_over_seeds() -> None:
    y, a, b = made(3, n=20_000)
    b = y ^ (np.random.default_rng(4).random((3, 20_000)) < np.array([[0.1], [0.2], [0.3]]))
    values = [stats.measure_of(stats.confusion(y, x)) for x in (a, b)]
    assert stats.crossed_test(y, a, b).p == pytest.approx(stats.seeds_test(*values).p, rel=0.05)


def test_equal_predictions_differ_by_nothing() -> None:
    y, a, _ = made(5)
    found = stats.crossed_test(y, a, a)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert stats.verdict(found, margin=0.005) == "indistinguishable"


def test_the_bootstrap_spreads_as_the_influences_say() -> None:
    y, a, b = made(6, n=3000)
    bootstrap, exact = stats.paired_bootstrap(y, a[0], b[0]), stats.crossed_test(y, a[0], b[0])
    assert bootstrap.difference == pytest.approx(exact.difference)
    assert bootstrap.error == pytest.approx(exact.error, rel=0.03)
    assert (bootstrap.low, bootstrap.high) == pytest.approx((exact.low, exact.high), abs=0.2 * exact.error)


def test_effect_size_is_d_z_with_hedges_correction() -> None:
    d = np.array([0.01, 0.02, 0.03])
    assert stats.effect_size(d) == pytest.approx(2.0 * (1 - 3 / 7))
    assert stats.effect_size([0.01]) is None


def comparison(difference: float, error: float, p: float) -> stats.Comparison:
    return stats.Comparison("mcc", difference, 0, 0, p, error, math.inf, 3, 5000)


def test_verdicts() -> None:
    assert stats.verdict(comparison(0.02, 0.005, 0.001), 0.005) == "better"
    assert stats.verdict(comparison(-0.02, 0.005, 0.001), 0.005) == "worse"
    assert stats.verdict(comparison(0.02, 0.005, 0.001), 0.005, p=0.2) == "unresolved"
    assert stats.verdict(comparison(0.001, 0.001, 0.3), 0.005) == "indistinguishable"
    assert stats.verdict(comparison(0.001, 0.01, 0.9), 0.005) == "unresolved"


def test_power_is_that_of_the_normal_test_and_detectable_inverts_it() -> None:
    found = comparison(0.0, 0.004, 1.0)
    z = 1.959964
    theory = scipy.stats.norm.sf(z - 2.5) + scipy.stats.norm.cdf(-z - 2.5)
    assert stats.power(found, 0.01) == pytest.approx(theory, abs=1e-4)
    assert stats.detectable(found) == pytest.approx(0.004 * (z + 0.841621), rel=1e-3)
    assert stats.power(found, stats.detectable(found)) == pytest.approx(0.8)


def test_the_best_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(7)
    y = rng.random(300) < 0.3
    scores = np.round(np.clip(rng.normal(0.3 + 0.2 * y, 0.15), 0, 1), 2)
    every = [matthews_corrcoef(y, scores >= t) for t in np.arange(0, 1.005, 0.005)]
    assert matthews_corrcoef(y, scores >= stats.best_threshold(y, scores)) == pytest.approx(max(every))
    assert stats.best_threshold([0, 1], [0.2, 0.9]) == 0.5


@pytest.mark.parametrize("spread", [0.0, 0.02])
def test_under_no_difference_the_crossed_test_keeps_its_size(spread: float) -> None:
    """500 comparisons: 5 % has a standard error of 1 %; scripts/simulate_tests runs 2,000 of 5,000 examples."""
    rng = np.random.default_rng(8)
    rejected = 0
    for _ in range(500):
        y = rng.random(1000) < 0.37
        hard = rng.beta(0.4, 2.0, 1000)
        a, b = (y ^ (rng.random((3, 1000)) < hard + rng.normal(0, spread, (3, 1))) for _ in range(2))
        rejected += stats.crossed_test(y, a, b).p <= 0.05
    assert rejected / 500 <= 0.06


def test_mcnemar_rejects_as_often_as_it_should_and_finds_what_theory_says() -> None:
    rng = np.random.default_rng(9)

    def rejects(only_a: float, only_b: float) -> float:
        draws = rng.multinomial(5000, [only_a, only_b, 1 - only_a - only_b], size=2000)
        return float((stats._mid_p(draws[:, 0], draws[:, 1]) <= 0.05).mean())

    assert rejects(0.04, 0.04) == pytest.approx(0.05, abs=0.01)
    assert rejects(0.045, 0.035) == pytest.approx(stats.mcnemar_power(5000, 0.045, 0.035), abs=0.03)
