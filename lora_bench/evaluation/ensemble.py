"""Figures of an ensemble: of its members, beside those of their averaged probabilities, and how far they differ.

member_<i>/<name>    each member's own, `calibrated/…` by a calibration of its own among them
members/<name>       their mean over the members
disagreement         over pairs of members and rows, the share that the two label differently
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
    """The figures of an ensemble's members on one split.

    Args:
        scores: (M, N) P(label 1), M of at least 2.
        labels: (N,) 0 or 1.
        metrics: extra metrics.
        calibrations: M, each fitted for one member.

    Raises:
        DivergedError: a score is not a finite number.
    """
    of_each = [
        score(own, labels, metrics) | score_calibrated(own, labels, calibration)
        for own, calibration in zip(scores, calibrations, strict=True)
    ]
    found: dict[str, float | None] = {"disagreement": disagreement(scores)}
    found |= {f"members/{name}": value for name, value in mean_metrics(of_each).items()}
    for i, each in enumerate(of_each):
        found |= {f"member_{i}/{name}": value for name, value in each.items()}
    return found


def disagreement(scores: NDArray[np.float64]) -> float:
    """The share of rows that two members label differently, over all pairs of the M members: (M, N) scores."""
    M = len(scores)
    ones = (scores >= DEFAULT_THRESHOLD).sum(axis=0)  # (N,) members that say 1
    return float((2 * ones * (M - ones) / (M * (M - 1))).mean())


def member_spread(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) how far the members' probabilities of a row lie apart: their standard deviation, from (M, N) scores."""
    return np.asarray(scores.std(axis=0))
