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


def score_members(
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    metrics: Mapping[str, Metric],
    calibrations: Sequence[Calibration],
) -> dict[str, float | None]:
    """Return the metrics of an ensemble's members on one split.

    Args:
        scores: (M, N) P(label 1); M is at least 2.
        labels: (N,) 0 or 1.
        metrics: extra metrics.
        calibrations: M, one fitted for each member.

    Returns:
        The values by the names that the module describes: `disagreement`, then `members/…` (None if it is None for a
        member), then `member_0/…` and so on.

    Raises:
        DivergedError: a score is not a finite number.
    """
    metrics_by_member = [
        score(member_scores, labels, metrics) | score_calibrated(member_scores, labels, calibration)
        for member_scores, calibration in zip(scores, calibrations, strict=True)
    ]
    values: dict[str, float | None] = {"disagreement": disagreement(scores)}
    values |= {f"members/{name}": value for name, value in mean_metrics(metrics_by_member).items()}
    for i, member_values in enumerate(metrics_by_member):
        values |= {f"member_{i}/{name}": value for name, value in member_values.items()}
    return values


def disagreement(scores: NDArray[np.float64]) -> float:
    """Return the share of rows that two members label differently, over all pairs of members, from (M, N) scores."""
    M = len(scores)
    ones = (scores >= DEFAULT_THRESHOLD).sum(axis=0)  # (N,) members that predict label 1
    return float((2 * ones * (M - ones) / (M * (M - 1))).mean())


def member_spread(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard deviation of each row's probability over the members: (N,) from (M, N) scores."""
    return np.asarray(scores.std(axis=0))
