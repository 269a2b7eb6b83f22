"""The bootstrap of every main metric: its spread is that of the influences, and memory stays bounded."""

from __future__ import annotations

import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from lora_bench.analysis import bootstrap, statistics
from lora_bench.analysis.bootstrap import bootstrap_interval, paired_bootstrap
from lora_bench.evaluation import main_metric

Three = tuple[np.ndarray, np.ndarray, np.ndarray]


def classes(k: int, n: int, seed: int = 0) -> Three:
    """Return labels and two predictions that agree on most examples."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    a = np.where(rng.random(n) < 0.8, y, rng.integers(0, k, n))
    return y, a, np.where(rng.random(n) < 0.8, a, rng.integers(0, k, n))


def numbers(n: int, decimals: int = 2) -> Three:
    rng = np.random.default_rng(1)
    y = rng.normal(size=n)
    a = y + 0.6 * rng.normal(size=n)
    return y.round(decimals), a.round(decimals), (0.7 * a + 0.6 * rng.normal(size=n)).round(decimals)


@pytest.mark.parametrize(
    ("measure", "data"),
    [
        *((measure, classes(3, 2000)) for measure in ("mcc", "accuracy", "macro_f1", "weighted_f1")),
        *((measure, classes(77, 3080)) for measure in ("mcc", "macro_f1")),
        *((measure, numbers(1000)) for measure in ("pearson", "spearman", "r2")),
        ("spearman", numbers(1000, decimals=0)),
        ("f1", classes(2, 2000)),
    ],
)
def test_the_bootstrap_spreads_as_the_influences_say(measure: str, data: Three) -> None:
    drawn, exact = paired_bootstrap(*data, measure, resamples=4000), statistics.crossed_test(*data, measure)
    assert drawn.difference == pytest.approx(exact.difference)
    assert drawn.error == pytest.approx(exact.error, rel=0.06)
    # With 40 examples of each class, F1 is biased by resampling: its interval lies a little lower.
    assert (drawn.low, drawn.high) == pytest.approx(exact.interval(), abs=0.3 * exact.error)


@pytest.mark.parametrize("measure", ["macro_f1", "spearman"])
def test_resamples_are_those_of_the_examples(measure: str) -> None:
    y, a, b = classes(3, 60) if measure == "macro_f1" else numbers(60, decimals=0)
    rng, differences = np.random.default_rng(2), []
    for _ in range(1000):
        rows = rng.integers(0, 60, 60)
        values = [
            f1_score(y[rows], p[rows], average="macro") if measure == "macro_f1" else spearmanr(y[rows], p[rows])[0]
            for p in (a, b)
        ]
        differences.append(values[0] - values[1])
    drawn = paired_bootstrap(y, a, b, measure)
    expected = (np.std(differences, ddof=1), *np.quantile(differences, [0.025, 0.975]))
    assert (drawn.error, drawn.low, drawn.high) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("measure", "data"), [("mcc", classes(3, 300)), ("spearman", numbers(300))])
def test_chunks_change_nothing(measure: str, data: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = paired_bootstrap(*data, measure, resamples=500)
    monkeypatch.setattr(bootstrap, "CHUNK_VALUES", 7000)
    assert astuple(paired_bootstrap(*data, measure, resamples=500)) == pytest.approx(astuple(whole))


def test_memory_is_bounded() -> None:
    for measure, data in (("macro_f1", classes(77, 3080)), ("spearman", numbers(20_000, decimals=3))):
        tracemalloc.start()
        paired_bootstrap(*data, measure, resamples=2000)
        assert tracemalloc.get_traced_memory()[1] < 300e6
        tracemalloc.stop()


def test_large_splits_have_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "MAX_DRAWS", 1000)
    drawn = paired_bootstrap(*numbers(50), "pearson")
    assert drawn.p >= 2 / (bootstrap.MIN_RESAMPLES + 1)


@pytest.mark.parametrize("measure", ["mcc", "macro_f1", "spearman", "r2"])
def test_equal_predictions_differ_by_nothing(measure: str) -> None:
    y, a, _ = classes(3, 50) if measure in ("mcc", "macro_f1") else numbers(50)
    for predicted in (a, np.full_like(y, 1)):
        drawn = paired_bootstrap(y, predicted, predicted, measure, resamples=200)
        assert (drawn.difference, drawn.low, drawn.high, drawn.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("measure", "data"), [("mcc", classes(2, 500)), ("macro_f1", classes(3, 500)), ("r2", numbers(500))]
)
def test_the_interval_of_one_model_is_that_of_its_resamples(measure: str, data: Three) -> None:
    y, a, _ = data
    rng = np.random.default_rng(3)
    rows = rng.integers(0, len(y), (2000, len(y)))
    expected = np.quantile([main_metric.compute(y[r], a[r], measure) for r in rows], [0.025, 0.975])
    assert bootstrap_interval(y, a, measure, resamples=2000) == pytest.approx(expected, abs=0.01)
