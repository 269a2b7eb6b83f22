"""An ensemble's figures against their definitions, worked out pair by pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from lora_bench.errors import DivergedError
from lora_bench.evaluation.calibration import Calibration, score_calibrated
from lora_bench.evaluation.ensemble import disagreement, member_spread, score_members
from lora_bench.evaluation.metrics import score

SCORES = np.array([[0.9, 0.2, 0.6, 0.5], [0.8, 0.7, 0.4, 0.1], [0.3, 0.1, 0.7, 0.49]])
LABELS = np.array([1, 0, 1, 0])
AS_IT_IS = Calibration(1.0)


def test_disagreement_is_the_share_of_rows_over_all_pairs_of_members() -> None:
    predicted = SCORES >= 0.5
    by_hand = np.mean([(one != other).mean() for one, other in combinations(predicted, 2)])
    assert disagreement(SCORES) == pytest.approx(by_hand)
    assert disagreement(SCORES[[0, 0]]) == 0
    assert disagreement(np.array([[0.9, 0.1], [0.1, 0.9]])) == 1


def test_spread_is_the_standard_deviation_over_members() -> None:
    assert member_spread(np.array([[0.2, 0.5], [0.4, 0.5]])) == pytest.approx([0.1, 0.0])


def test_each_member_has_its_figures_and_their_mean_stands_beside() -> None:
    own_ones = [Calibration(0.5), Calibration(1.0, 0.3), Calibration(2.0)]
    metrics = score_members(SCORES, LABELS, {}, own_ones)
    for i, member_scores in enumerate(SCORES):
        for name, value in (
            score(member_scores, LABELS, {}) | score_calibrated(member_scores, LABELS, own_ones[i])
        ).items():
            assert metrics[f"member_{i}/{name}"] == value
    for name in ("mcc", "nll", "calibrated/ece"):
        assert metrics[f"members/{name}"] == pytest.approx(np.mean([metrics[f"member_{i}/{name}"] for i in range(3)]))
    assert metrics["disagreement"] == disagreement(SCORES)


def test_the_mean_of_what_one_member_has_no_value_for_is_none() -> None:
    metrics = score_members(SCORES, np.ones(4, int), {}, [AS_IT_IS] * 3)
    assert metrics["member_0/auroc"] is None
    assert metrics["members/auroc"] is None


def test_the_mean_probability_is_never_less_likely_than_the_members_on_average() -> None:
    """−log is convex (Jensen): what makes ensembles worth their cost."""
    random = np.random.default_rng(0)
    scores, labels = random.uniform(size=(5, 50)), random.integers(0, 2, 50)
    pooled, members = score(scores.mean(axis=0), labels, {}), score_members(scores, labels, {}, [AS_IT_IS] * 5)
    for name in ("nll", "brier"):
        assert pooled[name] < members[f"members/{name}"]


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DivergedError):
        score_members(np.array([[0.5, np.nan], [0.5, 0.5]]), np.array([0, 1]), {}, [AS_IT_IS] * 2)
