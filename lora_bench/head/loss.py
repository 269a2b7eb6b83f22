"""From the logits of a head to its loss and to scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def label_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Return the loss of each row: (K, N), with the weight of its class.

    For one output it is the squared error of a number, otherwise the cross-entropy in nats. Weights are not normalised
    over the rows, so that neither micro-batches nor processes change what is learned.

    Args:
        logits: (K, N, C).
        labels: (K, N): class numbers, or numbers where C is 1.
        class_weights: (C,); None: all are 1.
    """
    if logits.shape[-1] == 1:
        return (logits[..., 0] - labels).square()
    losses = cross_entropy(logits, labels)
    return losses if class_weights is None else losses * class_weights.to(losses.device)[labels]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return −log p(label) of each row in nats: (K, N) from logits (K, N, C) and labels (K, N).

    Of two labels only the difference of the logits counts: p(label) = σ(±(z₁ − z₀)), with + for label 1.
    """
    if logits.shape[-1] > 2:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    signs = 2.0 * labels - 1.0
    return -F.logsigmoid(signs * (logits[..., 1] - logits[..., 0]))  # (K, N)


def scores_of_logits(logits: Tensor) -> Tensor:
    """Return the scores of logits (..., C).

    Returns:
        For two classes P(label 1), (...); for more the probability of each, (..., C); for one output the number, (...).
    """
    if logits.shape[-1] == 1:
        return logits[..., 0]
    return torch.sigmoid(logits[..., 1] - logits[..., 0]) if logits.shape[-1] == 2 else logits.softmax(-1)
