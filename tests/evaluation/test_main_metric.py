"""Metrics of classes and of numbers against scikit-learn and scipy, and every influence against a derivative."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics

from lora_bench.config.metric_names import MAIN_METRIC_CHOICES
from lora_bench.evaluation import confusion, main_metric, regression

if TYPE_CHECKING:
    from collections.abc import Callable

REFERENCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": metrics.accuracy_score,
    "macro_f1": lambda y, p: metrics.f1_score(y, p, average="macro", zero_division=0),
    "weighted_f1": lambda y, p: metrics.f1_score(y, p, average="weighted", zero_division=0),
    "f1": lambda y, p: metrics.f1_score(y, p, zero_division=0),
    "mcc": metrics.matthews_corrcoef,
    "pearson": lambda y, p: scipy.stats.pearsonr(y, p)[0],
    "spearman": lambda y, p: scipy.stats.spearmanr(y, p)[0],
    "r2": metrics.r2_score,
    "mse": metrics.mean_squared_error,
}


def draw_classes(seed: int, k: int, n: int = 300, agree: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predictions that agree more often than by chance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    return labels, np.where(rng.random(n) < agree, labels, rng.integers(0, k, n))


def class_cases(k: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return labels and predictions, degenerate ones included."""
    y, p = draw_classes(k, k)
    return {
        "usual": (y, p),
        "perfect": (y, y),
        "all wrong": (y, (y + 1) % k),
        "one label": (np.zeros_like(y), p),
        "one prediction": (y, np.full_like(y, k - 1)),
        "one of both": (np.zeros_like(y), np.zeros_like(y)),
        "never together": (np.zeros_like(y), np.ones_like(y)),
        "a class never predicted": (y, np.where(p == k - 1, 0, p)),
        "a class never labelled": (np.where(y == k - 1, 0, y), p),
    }


def number_cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    y = rng.normal(size=120)
    p = y + rng.normal(size=120)
    return {
        "usual": (y, p),
        "far from 0": (y + 1e6, p + 1e6),
        "ties": (np.round(y), np.round(p)),
        "ties in labels": (np.round(y), p),
        "perfect": (y, y),
        "reversed": (y, -y),
        "constant labels": (np.full(120, 0.1), p),
        "constant predictions": (y, np.full(120, 0.1)),
        "two values": ((y > 0).astype(float), (p > 0).astype(float)),
    }


@pytest.mark.parametrize("k", [2, 3, 77])
@pytest.mark.parametrize("case", class_cases(3))
def test_class_metrics_are_those_of_scikit_learn(k: int, case: str) -> None:
    y, p = class_cases(k)[case]
    for measure in MAIN_METRIC_CHOICES["multiclass"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, that only one label occurs
            expected = REFERENCES[measure](y, p)
        assert confusion.compute_class_metric(confusion.class_totals(y, p, k), measure) == pytest.approx(expected)
        assert main_metric.compute(y, p, measure) == pytest.approx(expected)
    assert np.array_equal(confusion.confusion_matrix(y, p, k), metrics.confusion_matrix(y, p, labels=range(k)))
    if k == 2:
        assert main_metric.compute(y, p, "f1") == pytest.approx(REFERENCES["f1"](y, p))


def test_metrics_of_two_classes_are_the_same_by_both_formulas() -> None:
    y, p = draw_classes(0, 2)
    for measure in ("mcc", "accuracy"):
        of_two = confusion.compute_metric(confusion.confusion_counts(y, p), measure)
        assert confusion.compute_class_metric(confusion.class_totals(y, p), measure) == pytest.approx(float(of_two))


@pytest.mark.parametrize("case", number_cases())
def test_metrics_of_numbers_are_those_of_scipy(case: str) -> None:
    y, p = number_cases()[case]
    for measure in (*MAIN_METRIC_CHOICES["regression"], "mse"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, about constant input, for which it gives NaN
            expected = np.nan_to_num(REFERENCES[measure](y, p))
        if measure == "r2" and case == "constant labels":
            expected = 0.0
        assert regression.compute_metric(y, p, measure) == pytest.approx(expected, rel=1e-6, abs=1e-9), measure


def weighted_metric(y: np.ndarray, p: np.ndarray, w: np.ndarray, measure: str) -> float:
    """Return a metric of a weighted sample, by its definition."""
    w = w / w.sum()
    if measure == "mse":
        return float(w @ (y - p) ** 2)
    if measure == "r2":
        return float(1 - w @ (y - p) ** 2 / (w @ (y - w @ y) ** 2))
    if measure == "spearman":
        y, p = (((x[:, None] > x) + (x[:, None] == x) / 2) @ w for x in (y, p))
    if measure in ("pearson", "spearman"):
        a, b = y - w @ y, p - w @ p
        return float(w @ (a * b) / np.sqrt((w @ a**2) * (w @ b**2)))
    y, p = y.astype(int), p.astype(int)
    k = 1 + max(y.max(), p.max())
    totals = [np.bincount(y[y == p], w[y == p], k), np.bincount(y, w, k), np.bincount(p, w, k)]
    if measure == "f1":
        return float(2 * totals[0][1] / (totals[1][1] + totals[2][1]))
    return float(confusion.compute_class_metric(totals, measure))


def derivative(y: np.ndarray, p: np.ndarray, measure: str, h: float = 1e-4) -> np.ndarray:
    """Return N times the derivative of a metric by the weight of each example: (N,)."""
    ones, n = np.ones(len(y)), len(y)
    sides = [[weighted_metric(y, p, ones + sign * h * e, measure) for e in np.eye(n)] for sign in (1, -1)]
    return n * (np.array(sides[0]) - sides[1]) / (2 * h)


@pytest.mark.parametrize("k", [2, 3, 77])
@pytest.mark.parametrize("case", class_cases(3))
def test_class_influences_are_derivatives_and_have_mean_zero(k: int, case: str) -> None:
    y, p = class_cases(k)[case]
    for measure in (*MAIN_METRIC_CHOICES["multiclass"], *(["f1"] if k == 2 else [])):
        added = main_metric.pseudo_values(y, p[None], measure)[0] - main_metric.compute(y, p, measure)
        assert added.mean() == pytest.approx(0, abs=1e-9)
        is_undefined = measure == "mcc" and (len(set(y)) == 1 or len(set(p)) == 1)
        no_f1 = measure == "f1" and not (y.any() or p.any())
        if is_undefined or no_f1:
            assert not added.any()
        else:
            assert added == pytest.approx(derivative(y, p, measure), abs=1e-5), measure


@pytest.mark.parametrize("case", number_cases())
def test_influences_of_numbers_are_derivatives_and_have_mean_zero(case: str) -> None:
    y, p = number_cases()[case]
    for measure in (*MAIN_METRIC_CHOICES["regression"], "mse"):
        added = regression.influence(y, p, measure)
        assert added.mean() == pytest.approx(0, abs=1e-6), measure
        undefined = ("constant labels", *(["constant predictions"] if measure in ("pearson", "spearman") else []))
        if case in undefined and measure != "mse":
            assert not added.any()
        elif case != "far from 0":  # where the numeric derivative is rounded away
            assert added == pytest.approx(derivative(y, p, measure), abs=1e-5), measure


def test_many_models_at_once_are_each_alone() -> None:
    y, p = draw_classes(1, 5)
    others = np.stack([p, np.roll(p, 1), y])
    numbers, guesses = y + np.linspace(0, 1, len(y)), others + 0.5
    for measure, labels, predicted in (("macro_f1", y, others), ("mcc", y, others), ("spearman", numbers, guesses)):
        together = main_metric.pseudo_values(labels, predicted, measure)
        alone = [main_metric.pseudo_values(labels, row[None], measure)[0] for row in predicted]
        assert together == pytest.approx(np.stack(alone))
        assert together.mean(1) == pytest.approx(main_metric.compute(labels, predicted, measure))


@pytest.mark.parametrize("measure", ["mcc", "macro_f1", "weighted_f1", "pearson", "spearman", "r2"])
def test_the_variance_of_the_influence_is_that_of_the_metric(measure: str) -> None:
    rng = np.random.default_rng(3)
    values, expected = [], []
    for _ in range(400):
        y: np.ndarray
        p: np.ndarray
        if measure in MAIN_METRIC_CHOICES["regression"]:
            y = rng.normal(size=400)
            p = 0.8 * y + 0.4 * rng.normal(size=400)
        else:
            y = rng.choice(3, 400, p=[0.6, 0.3, 0.1])
            p = np.where(rng.random(400) < 0.8, y, rng.integers(0, 3, 400))
        pseudo = main_metric.pseudo_values(y, p[None], measure)[0]
        values.append(pseudo.mean())
        expected.append(pseudo.var() / 400)
    assert np.mean(expected) == pytest.approx(np.var(values), rel=0.25)
