"""The fitted layer is scikit-learn's ridge regression with the best left-out error, scaled as a logistic regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from torch import Tensor

from lora_bench.head.fitting import PENALTIES, fit_output_layer


def examples(outputs: int, rows: int = 60, columns: int = 90) -> tuple[Tensor, Tensor]:
    """Features, some of which are constant, and labels that a few of them predict with noise."""
    generator = torch.Generator().manual_seed(outputs)
    X = torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 10, columns) + 3
    X[:, 5] = 1.0
    scores = X[:, :20] / X[:, :20].std(0).clamp_min(0.1) @ torch.randn(20, outputs, generator=generator)
    scores = scores - scores.mean(0) + torch.randn(rows, outputs, generator=generator)
    return X, scores[:, 0] if outputs == 1 else (scores.argmax(1) if outputs > 2 else (scores[:, 0] > 1).long())


def standardised(X: Tensor) -> np.ndarray:
    Z = X.double().numpy()
    deviation = Z.std(0, ddof=1)
    return (Z - Z.mean(0)) / np.where(deviation > 1e-6, deviation, np.inf)


@pytest.mark.parametrize("columns", [20, 90])
def test_numbers_get_the_ridge_regression_with_the_best_penalty(columns: int) -> None:
    X, y = examples(1, columns=columns)
    layer = fit_output_layer(X, y, 1)
    assert layer is not None
    Z = standardised(X)
    chosen = RidgeCV(alphas=[penalty * len(X) for penalty in PENALTIES]).fit(Z, y.double().numpy())
    found = F.linear(X, *layer)[:, 0].numpy()
    np.testing.assert_allclose(found, chosen.predict(Z), rtol=0, atol=1e-3)


@pytest.mark.parametrize("outputs", [2, 4])
def test_classes_get_it_scaled_to_the_best_cross_entropy_of_left_out_examples(outputs: int) -> None:
    X, y = examples(outputs)
    layer = fit_output_layer(X, y, outputs)
    assert layer is not None
    Z, targets = standardised(X), F.one_hot(y, outputs).double().numpy()
    alphas = [penalty * len(X) for penalty in PENALTIES]

    def left_out(alpha: float) -> np.ndarray:
        rows = []
        for i in range(len(Z)):
            rest = np.arange(len(Z)) != i
            rows.append(Ridge(alpha=alpha).fit(Z[rest], targets[rest]).predict(Z[i : i + 1])[0])
        return np.array(rows)

    errors = {alpha: ((left_out(alpha) - targets) ** 2).mean() for alpha in alphas}
    alpha = min(errors, key=lambda one: errors[one])
    slopes = Ridge(alpha=alpha).fit(Z, targets).predict(Z) - targets.mean(0)
    logits = F.linear(X, *layer).double() - torch.from_numpy(targets.mean(0)).log()
    factor = float((logits * torch.from_numpy(slopes)).sum() / torch.from_numpy(slopes).square().sum())
    torch.testing.assert_close(logits, factor * torch.from_numpy(slopes), atol=1e-3, rtol=0)

    def loss(a: float) -> float:
        scores = torch.from_numpy(a * (left_out(alpha) - targets.mean(0)) + np.log(targets.mean(0)))
        return F.cross_entropy(scores, y).item()

    assert loss(factor) <= min(loss(0.9 * factor), loss(1.1 * factor))


def test_of_two_classes_it_orders_new_examples_as_a_logistic_regression_does() -> None:
    X, y = examples(2, rows=400, columns=30)
    layer = fit_output_layer(X[:300], y[:300], 2)
    assert layer is not None
    difference = F.linear(X[300:], *layer).diff(dim=1)[:, 0].numpy()
    reference = LogisticRegression(C=1.0).fit(standardised(X)[:300], y[:300]).decision_function(standardised(X)[300:])
    assert np.corrcoef(difference, reference)[0, 1] > 0.97


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_features_that_tell_nothing_fit_nothing(outputs: int) -> None:
    y = torch.arange(40) % max(2, outputs)
    assert fit_output_layer(torch.ones(40, 7), y.float() if outputs == 1 else y, outputs) is None


def test_a_class_without_examples_has_finite_weights() -> None:
    X, y = examples(2)
    layer = fit_output_layer(X, y, 3)
    assert layer is not None
    assert all(math.isfinite(value) for tensor in layer for value in tensor.flatten().tolist())
    assert F.linear(X, *layer).argmax(1).max() < 2
