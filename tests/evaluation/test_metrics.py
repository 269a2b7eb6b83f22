"""Metrics are the field's: scikit-learn's to six digits where it has them, a plain loop where it has not.

And what torchmetrics would get wrong is stated here case by case: constant predictors, one label only, scores that are
not numbers, a score of exactly one half.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from lora_bench.config.schema import Metric
from lora_bench.errors import Code, DivergedError
from lora_bench.evaluation.metrics import check_metrics, class_metrics, expected_calibration_error, score
from tests.command_line import refuses

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

STANDARD = ["accuracy", "auroc", "brier", "ece", "f1", "mcc", "nll", "precision", "recall"]


def random_scores(n: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Scores that know a little about their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return np.clip(0.5 * rng.random(n) + 0.3 * labels + 0.1, 0, 1), labels


def plain_ece(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Guo et al. 2017, eq. 3, row by row."""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for s, y in zip(scores.tolist(), labels.tolist(), strict=True):
        confidence = max(s, 1 - s)
        bin_number = next(i for i in range(15) if confidence <= (i + 1) / 15)
        bins[bin_number].append((confidence, (s >= 0.5) == (y == 1)))
    total = 0.0
    for members in bins:
        if members:
            accuracy = sum(right for _, right in members) / len(members)
            confidence = sum(c for c, _ in members) / len(members)
            total += len(members) / len(scores) * abs(accuracy - confidence)
    return total


@pytest.mark.parametrize(("n", "seed"), [(7, 0), (100, 1), (1000, 2), (20_000, 3)])
def test_standard_metrics_are_scikit_learns(n: int, seed: int) -> None:
    scores, labels = random_scores(n, seed)
    predicted = scores >= 0.5
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "f1": sklearn.metrics.f1_score(labels, predicted),
        "mcc": sklearn.metrics.matthews_corrcoef(labels, predicted),
        "precision": sklearn.metrics.precision_score(labels, predicted),
        "recall": sklearn.metrics.recall_score(labels, predicted),
        "auroc": sklearn.metrics.roc_auc_score(labels, scores),
        "nll": sklearn.metrics.log_loss(labels, scores),
        "brier": sklearn.metrics.brier_score_loss(labels, scores),
        "ece": plain_ece(scores, labels),
    }
    values = score(scores, labels, {})
    assert sorted(values) == STANDARD
    for name, value in expected.items():
        assert_allclose(values[name], value, atol=1e-6, err_msg=name)
    json.dumps(values)  # plain floats, not numpy's


def test_ties_in_the_scores_count_half() -> None:
    scores, labels = random_scores(500, 4)
    coarse = np.round(scores, 1)
    assert_allclose(score(coarse, labels, {})["auroc"], sklearn.metrics.roc_auc_score(labels, coarse), atol=1e-6)


def test_one_half_is_predicted_one_by_every_metric() -> None:
    values = score(np.array([0.5, 0.2, 0.7, np.nextafter(0.5, 0)]), np.array([1, 0, 1, 0]), {})
    for name in ("accuracy", "f1", "precision", "recall", "mcc"):
        assert values[name] == 1.0, name
    specificity = {"specificity": Metric(torchmetric="BinarySpecificity", direction="up")}
    assert score(np.array([0.5, 0.2]), np.array([0, 0]), specificity)["specificity"] == 0.5


@pytest.mark.parametrize("constant", [0.1, 0.5, 0.9])
def test_a_constant_predictor_has_no_correlation(constant: float) -> None:
    labels = np.array([1, 0, 0, 1, 0, 1, 1, 0, 0, 0])
    assert score(np.full(10, constant), labels, {})["mcc"] == 0.0


@pytest.mark.parametrize("label", [0, 1])
def test_one_label_only_has_no_auroc_and_warns_of_nothing(label: int) -> None:
    extra = {
        "average_precision": Metric(torchmetric="BinaryAveragePrecision", direction="up"),
        "kappa": Metric(torchmetric="BinaryCohenKappa", direction="up"),
    }
    values = score(np.array([0.1, 0.8, 0.3]), np.full(3, label), extra)
    assert values["auroc"] is None
    assert values["mcc"] == 0.0
    assert_allclose(values["accuracy"], 1 / 3 if label else 2 / 3, atol=1e-6)
    json.dumps(values, allow_nan=False)
    constant = score(np.full(3, 0.9 * label), np.full(3, label), extra)
    assert constant["kappa"] is None  # 0 / 0
    json.dumps(constant, allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused_and_counted(bad: float) -> None:
    with pytest.raises(DivergedError, match=r"\b2\b.*\b4\b"):
        score(np.array([0.1, bad, 0.9, bad]), np.array([0, 1, 1, 0]), {})


def test_a_sure_and_wrong_score_costs_a_finite_number_of_nats() -> None:
    values = score(np.array([0.0, 1.0]), np.array([1, 0]), {})
    assert_allclose(values["nll"], -np.log(1e-15))
    assert values["brier"] == 1.0
    assert score(np.array([0.0, 1.0]), np.array([0, 1]), {})["nll"] == 0.0


def test_ece_by_hand() -> None:
    # Four rows at confidence 0.9, three of them right: |0.75 - 0.9|.
    assert_allclose(expected_calibration_error(np.full(4, 0.9), np.array([1, 1, 1, 0])), 0.15)
    # The same seen from the other label: what is binned is the confidence in the predicted label.
    assert_allclose(expected_calibration_error(np.full(4, 0.1), np.array([0, 0, 0, 1])), 0.15)
    # Two bins of two rows: 0.6 (one right) and 1.0 (both right).
    assert_allclose(expected_calibration_error(np.array([0.6, 0.6, 1.0, 1.0]), np.array([1, 0, 1, 1])), 0.05)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1, 0])) == 0.0
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([0, 1])) == 1.0


def test_extra_metrics_by_their_name_in_torchmetrics() -> None:
    scores, labels = random_scores(300, 5)
    extra = {
        "average_precision": Metric(torchmetric="BinaryAveragePrecision", direction="up"),
        "kappa": Metric(torchmetric="BinaryCohenKappa", direction="up"),
        "specificity": Metric(torchmetric="BinarySpecificity", direction="up"),
    }
    check_metrics(extra)
    values = score(scores, labels, extra)
    assert sorted(values) == sorted([*STANDARD, *extra])
    predicted = scores >= 0.5
    assert_allclose(values["average_precision"], sklearn.metrics.average_precision_score(labels, scores), atol=1e-6)
    assert_allclose(values["kappa"], sklearn.metrics.cohen_kappa_score(labels, predicted), atol=1e-6)
    assert_allclose(values["specificity"], sklearn.metrics.recall_score(labels, predicted, pos_label=0), atol=1e-6)


def test_an_unknown_metric_is_refused_with_a_near_name() -> None:
    with refuses(Code.UNKNOWN_CHOICE, key="metric.specificity.torchmetric") as caught:
        check_metrics({"specificity": Metric(torchmetric="BinarySpecifity", direction="up")})
    assert caught.value.value == "BinarySpecifity"
    assert "BinarySpecificity" in str(caught.value.remedy)


@pytest.mark.parametrize("beta", [0.5, 2, 2.0])
@pytest.mark.parametrize("name", ["FBetaScore", "BinaryFBetaScore"])
def test_a_metric_with_an_argument(name: str, beta: float) -> None:
    scores, labels = random_scores(300, 6)
    metric = {"f_beta": Metric(torchmetric=name, args={"beta": beta})}
    check_metrics(metric)
    expected = sklearn.metrics.fbeta_score(labels, scores >= 0.5, beta=beta)
    assert_allclose(score(scores, labels, metric)["f_beta"], expected, atol=1e-6)


def test_a_threshold_counts_a_score_that_equals_it_as_label_1() -> None:
    scores, labels = np.array([0.3, 0.1, 0.2, 0.9]), np.array([1, 0, 0, 0])
    for threshold, recall in ((0.3, 1.0), (0.31, 0.0)):
        metric = {"recall_at": Metric(torchmetric="Recall", args={"threshold": threshold})}
        assert score(scores, labels, metric)["recall_at"] == recall


@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        ({}, Code.MISSING, "metric.mine.args.beta"),
        ({"bta": 2.0}, Code.UNKNOWN_KEY, "metric.mine.args.bta"),
        ({"beta": 2.0, "compute_on_cpu": True}, Code.UNKNOWN_KEY, "metric.mine.args.compute_on_cpu"),
        ({"beta": -1.0}, Code.INVALID_VALUE, "metric.mine.args"),
        ({"beta": "two"}, Code.INVALID_VALUE, "metric.mine.args"),
        ({"beta": 2.0, "threshold": 3}, Code.INVALID_VALUE, "metric.mine.args"),
    ],
)
def test_wrong_arguments_are_refused_before_training(arguments: dict[str, Any], code: Code, key: str) -> None:
    with refuses(code, key=key) as caught:
        check_metrics({"mine": Metric(torchmetric="FBetaScore", args=arguments)})
    assert "bta" not in arguments or "beta?" in str(caught.value)


@pytest.mark.parametrize("name", ["BinaryROC", "BinaryConfusionMatrix"])
def test_a_metric_that_is_no_single_number_is_refused_before_training(name: str) -> None:
    with refuses(Code.UNSUPPORTED, key="metric.mine.torchmetric") as caught:
        check_metrics({"mine": Metric(torchmetric=name, direction="up")})
    assert caught.value.value == name


ROWS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def mcc(predicted: np.ndarray, labels: np.ndarray) -> float:
    value = score(predicted.astype(np.float64), labels, {})["mcc"]
    assert value is not None
    return value


@settings(deadline=None)
@given(ROWS)
def test_mcc_is_a_correlation(rows: list[tuple[bool, bool]]) -> None:
    predicted, positive = map(np.array, zip(*rows, strict=True))
    labels = positive.astype(np.int64)
    value = mcc(predicted, labels)
    assert -1.0 <= value <= 1.0
    assert_allclose(mcc(~predicted, 1 - labels), value, atol=1e-12)  # the other label is as good
    assert_allclose(mcc(~predicted, labels), -value, atol=1e-12)
    assert_allclose(mcc(positive, predicted.astype(np.int64)), value, atol=1e-12)
    varied = len(set(predicted.tolist())) == 2 and len(set(positive.tolist())) == 2
    expected = np.corrcoef(predicted, positive)[0, 1] if varied else 0.0
    assert_allclose(value, expected, atol=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=60))
def test_every_metric_stays_in_its_range(rows: list[tuple[float, int]]) -> None:
    scores, labels = map(np.array, zip(*rows, strict=True))
    values = score(scores.astype(np.float64), labels.astype(np.int64), {})
    for name, value in values.items():
        if name not in ("nll", "mcc") and value is not None:
            assert 0.0 <= value <= 1.0 + 1e-6, name
    assert 0.0 <= values["nll"] <= 34.6
    assert -1.0 <= values["mcc"] <= 1.0


# --- more classes ---


def class_scores(classes: int, n: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return probabilities (n, classes) that know a little about their labels; not every class need occur."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)).round(1) + 1.5 * np.eye(classes)[labels]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True), labels


@pytest.mark.parametrize(("classes", "n"), [(3, 9), (3, 1000), (77, 200), (77, 3000)])
def test_metrics_of_many_classes_are_scikit_learns(classes: int, n: int) -> None:
    scores, labels = class_scores(classes, n, n)
    predicted, present = scores.argmax(1), np.unique(labels)
    with np.errstate(all="ignore"):
        expected = {
            "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
            "macro_f1": sklearn.metrics.f1_score(labels, predicted, average="macro"),
            "weighted_f1": sklearn.metrics.f1_score(labels, predicted, average="weighted"),
            "mcc": sklearn.metrics.matthews_corrcoef(labels, predicted),
            "auroc": np.mean([sklearn.metrics.roc_auc_score(labels == c, scores[:, c]) for c in present]),
            "nll": sklearn.metrics.log_loss(labels, scores, labels=np.arange(classes)),
            "brier": ((scores - np.eye(classes)[labels]) ** 2).sum(1).mean(),
        }
    values = score(scores, labels, {})
    assert sorted(values) == sorted([*expected, "ece"])
    for name, value in expected.items():
        assert_allclose(values[name], value, atol=1e-6, err_msg=name)
    if len(present) == classes:
        whole = sklearn.metrics.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
        assert_allclose(values["auroc"], whole, atol=1e-6)
    json.dumps(values)


@pytest.mark.parametrize(
    ("labels", "predicted"),
    [([0, 0, 0], [0, 0, 0]), ([0, 0, 0], [1, 1, 1]), ([0, 1, 1], [1, 1, 1]), ([0, 1, 2], [0, 0, 1]), ([2], [2])],
)
def test_degenerate_splits_of_three_classes_have_finite_metrics(labels: list[int], predicted: list[int]) -> None:
    scores, y = 0.4 * np.eye(3)[predicted] + 0.2, np.array(labels)
    values = score(scores, y, {"specificity": Metric(torchmetric="Specificity")})
    both = len({*labels, *predicted}) > 1
    assert_allclose(values["mcc"], sklearn.metrics.matthews_corrcoef(y, predicted) if both else 0.0, atol=1e-6)
    assert_allclose(values["macro_f1"], sklearn.metrics.f1_score(y, predicted, average="macro"), atol=1e-6)
    assert (values["auroc"] is None) == (len(set(labels)) == 1)
    json.dumps(values, allow_nan=False)


def test_ece_of_three_classes_is_about_the_predicted_one() -> None:
    scores = np.array([[0.9, 0.05, 0.05]] * 4)
    assert_allclose(expected_calibration_error(scores, np.array([0, 0, 0, 2])), 0.15)
    assert_allclose(expected_calibration_error(scores[:, [1, 0, 2]], np.array([1, 1, 1, 2])), 0.15)


def test_metrics_of_each_class_are_scikit_learns() -> None:
    scores, labels = class_scores(5, 300, 0)
    names = [f"class {i}" for i in range(5)]
    table = sklearn.metrics.precision_recall_fscore_support(labels, scores.argmax(1))
    values = class_metrics(scores, labels, names)
    assert [*values] == names
    for column, key in zip(table, ("precision", "recall", "f1", "support"), strict=True):
        assert_allclose([values[name][key] for name in names], column)


@pytest.mark.parametrize("name", ["FBetaScore", "BinaryFBetaScore", "MulticlassFBetaScore"])
def test_extra_metrics_take_the_form_of_the_task(name: str) -> None:
    extra = {"f2": Metric(torchmetric=name, args={"beta": 2})}
    check_metrics(extra)
    check_metrics(extra, "multiclass", 3)
    scores, labels = class_scores(3, 200, 0)
    expected = sklearn.metrics.fbeta_score(labels, scores.argmax(1), beta=2, average="macro")
    assert_allclose(score(scores, labels, extra)["f2"], expected, atol=1e-6)
    with refuses(Code.UNKNOWN_CHOICE, key="metric.f2.torchmetric"):
        check_metrics(extra, "regression")


# --- numbers ---


def test_metrics_of_numbers_are_scipys_and_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=500).round(1)  # with ties
    scores = labels + rng.normal(size=500).round(1)
    expected = {
        "pearson": scipy.stats.pearsonr(scores, labels)[0],
        "spearman": scipy.stats.spearmanr(scores, labels)[0],
        "mse": sklearn.metrics.mean_squared_error(labels, scores),
        "mae": sklearn.metrics.mean_absolute_error(labels, scores),
        "r2": sklearn.metrics.r2_score(labels, scores),
    }
    extra = {"kendall": Metric(torchmetric="KendallRankCorrCoef")}
    check_metrics(extra, "regression")
    values = score(scores, labels, extra)
    assert_allclose(values.pop("kendall"), scipy.stats.kendalltau(scores, labels)[0], atol=1e-4)
    assert [*values] == [*expected]
    for name, value in expected.items():
        assert_allclose(values[name], value, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("scores", "labels"), [([1.0, 1.0, 1.0], [0.0, 1.0, 2.0]), ([0.0, 1.0, 2.0], [3.0, 3.0, 3.0])])
def test_constant_numbers_have_no_correlation(scores: list[float], labels: list[float]) -> None:
    values = score(np.array(scores), np.array(labels), {})
    assert (values["pearson"], values["spearman"]) == (0.0, 0.0)
    json.dumps(values, allow_nan=False)
