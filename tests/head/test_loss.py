"""The loss of a head and the scores of its logits, for two classes, more classes and numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from lora_bench.head.loss import label_loss, scores_of_logits
from lora_bench.training.objective import balanced_weights


@pytest.mark.parametrize("classes", [2, 3, 77])
def test_the_loss_is_the_cross_entropy_of_torch(classes: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 50, classes), torch.randint(classes, (2, 50))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 50)
    torch.testing.assert_close(label_loss(logits, labels), expected)
    weights = torch.rand(classes)
    weighted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weights, reduction="none").view(2, 50)
    torch.testing.assert_close(label_loss(logits, labels, weights), weighted)
    expected_scores = logits.softmax(-1)
    torch.testing.assert_close(scores_of_logits(logits), expected_scores if classes > 2 else expected_scores[..., 1])


def test_the_loss_of_a_number_is_the_squared_error() -> None:
    logits, labels = torch.randn(2, 50, 1), torch.randn(2, 50)
    torch.testing.assert_close(label_loss(logits, labels), (logits[..., 0] - labels) ** 2)
    torch.testing.assert_close(scores_of_logits(logits), logits[..., 0])


def test_balanced_weights_are_scikit_learns_with_mean_one_over_the_examples() -> None:
    labels = np.array([0] * 90 + [2] * 9 + [3])
    weights = balanced_weights(labels, 5).numpy()
    np.testing.assert_allclose(
        weights[[0, 2, 3]], compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels), 1e-6
    )
    assert weights[[1, 4]].tolist() == [1, 1]  # no example has them
    np.testing.assert_allclose(weights[labels].mean(), 1, 1e-6)
