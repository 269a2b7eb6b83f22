"""Scores of a split: the form of its task, and the classes that they predict. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD

if TYPE_CHECKING:
    from numpy.typing import NDArray

Labels: TypeAlias = "NDArray[Any]"
"""(N,) class numbers, or numbers to predict."""


def form_of(scores: NDArray[np.float64], labels: Labels) -> str:
    """Return the form of a task, a key of `SHOWN_METRICS`, from its scores, (N,) or (N, C), and labels (N,)."""
    if labels.dtype.kind == "f":
        return "regression"
    return "binary" if scores.ndim == 1 else "multiclass"


def predict_labels(scores: NDArray[np.float64], threshold: float = DEFAULT_THRESHOLD) -> NDArray[np.int64]:
    """Return the predicted classes (N,): of (N,) scores of two classes, or the most probable of (N, C).

    Args:
        scores: without a leading dimension of members.
        threshold: the score from which on label 1 of two is predicted.
    """
    return scores.argmax(-1) if scores.ndim > 1 else (scores >= threshold).astype(np.int64)
