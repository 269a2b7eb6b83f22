"""Metrics of an ensemble: those of its members, reported beside those of their averaged probabilities.

member_<i>/<name>    a member's metric; `calibrated/…` use a calibration of that member alone
members/<name>       the mean over the members
disagreement         the share of rows that two members label differently, averaged over pairs of members
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_bench.config.metric_names import DEFAULT_THRESHOLD
from lora_bench.evaluation.calibration import score_calibrated
from lora_bench.evaluation.metrics import mean_metrics, score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.config.schema import Metric
    from lora_bench.evaluation.calibration import Calibration
    from lora_bench.evaluation.scores import Labels


def score_members(
    scores: NDArray[np.float64],
    labels: Labels,
    metrics: Mapping[str, Metric],
    calibrations: Sequence[Calibration | None],
) -> dict[str, float | None]:
    """Return the metrics of an ensemble's members on one split.

    Args:
        scores: (M, N) or (M, N, C), those of `score` for each member; M is at least 2.
        labels: (N,).
        metrics: extra metrics.
        calibrations: M, one fitted for each member; None where numbers are predicted.

    Returns:
        The values by the names that the module describes: `disagreement` (of classes), then `members/…` (None if it is
        None for a member), then `member_0/…` and so on.

    Raises:
        DivergedError: a score is not a finite number.
    """
    metrics_by_member = [
        score(member_scores, labels, metrics) | score_calibrated(member_scores, labels, calibration)
        for member_scores, calibration in zip(scores, calibrations, strict=True)
    ]
    values: dict[str, float | None] = {}
    if labels.dtype.kind != "f":
        values["disagreement"] = disagreement(scores)
    values |= {f"members/{name}": value for name, value in mean_metrics(metrics_by_member).items()}
    for i, member_values in enumerate(metrics_by_member):
        values |= {f"member_{i}/{name}": value for name, value in member_values.items()}
    return values


def disagreement(scores: NDArray[np.float64]) -> float:
    """Return the share of rows that two members label differently, over all pairs of members.

    Args:
        scores: (M, N) P(label 1), or (M, N, C).
    """
    M = len(scores)
    if scores.ndim > 2:
        predicted = scores.argmax(-1)  # (M, N)
        votes = (predicted[..., None] == np.arange(scores.shape[-1])).sum(axis=0)  # (N, C)
    else:
        ones = (scores >= DEFAULT_THRESHOLD).sum(axis=0)  # (N,) members that predict label 1
        votes = np.stack([M - ones, ones], -1)  # (N, 2)
    return float(1 - ((votes * (votes - 1)).sum(-1) / (M * (M - 1))).mean())


def member_spread(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation of each row's score over the members: (N,) from (M, N) scores.

    Of (M, N, C) scores it is that of the class with the highest mean probability.
    """
    if scores.ndim > 2:
        top = scores.mean(axis=0).argmax(-1)  # (N,)
        scores = np.take_along_axis(scores, top[None, :, None], axis=2)[..., 0]  # (M, N)
    return np.asarray(scores.std(axis=0))
