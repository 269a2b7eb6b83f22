"""The budget of a search: what it has spent, and how large the next pack may be."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from lora_bench.config.schema import Packing, Search
from lora_bench.sweeps.search_trials import (
    Trial,
    affordable,
    best_repeated,
    best_trial,
    estimate_final_scores,
    full_flops,
    seconds_spent,
    setting_of,
)


def budget(
    trials: int | None = None, flops: float | None = None, minutes: float | None = None, repeats: int = 0
) -> Search:
    return Search(trials=trials, flops=flops, minutes=minutes, repeats=repeats, final_seeds=1)


def pack(*, halving: bool = True) -> Packing:
    return Packing(size=4, memory_bytes=None, workers=None, halving=halving)


DONE = Trial(["adapter.rank=2"], "done", 0.5, flops=80, steps=8)
ELIMINATED = Trial(["adapter.rank=4"], "eliminated", flops=20, steps=2)
HALVED = [DONE, ELIMINATED, ELIMINATED, ELIMINATED]
"""A pack of 140 FLOPs. Four trials of 80 FLOPs take 160: two train from a quarter of the steps on, one from half on."""


@pytest.mark.parametrize(
    ("search", "halving", "count"),
    [
        (budget(trials=10), True, 4),
        (budget(trials=6), True, 2),
        (budget(trials=4), True, 0),
        (budget(flops=140 + 160), True, 4),
        (budget(flops=140 + 159), True, 3),
        (budget(flops=140 + 79), True, 0),
        (budget(flops=140 + 160), False, 2),
        (budget(flops=140 + 160 + 160, repeats=2), True, 4),
        (budget(flops=140 + 160 + 159, repeats=2), True, 3),
        (budget(flops=140 + 160, repeats=1), True, 4),  # there is nothing to choose between, so nothing is repeated
        (budget(trials=100, minutes=15.1 / 60), True, 4),  # a second for each 20 FLOPs
        (budget(minutes=8 / 60), True, 0),
    ],
)
def test_a_pack_is_as_large_as_the_budget_allows(search: Search, halving: bool, count: int) -> None:
    assert affordable(HALVED, search, pack(halving=halving), seconds=7) == count


def test_the_first_pack_starts_whatever_it_costs() -> None:
    assert affordable([], budget(flops=1), pack(), seconds=0) == 4
    assert affordable([], budget(trials=3, minutes=1), pack(), seconds=1000) == 3


def test_a_trial_that_trained_to_its_end_and_has_the_best_score_wins() -> None:
    better = Trial(["adapter.rank=8"], "done", 0.6)
    assert best_trial([ELIMINATED, DONE, better, Trial(["adapter.rank=9"], "done", 0.6)]) is better
    assert best_trial([ELIMINATED]) is None
    assert full_flops(HALVED) == 80
    assert full_flops([ELIMINATED]) == 20


def test_an_eliminated_trial_is_judged_by_what_the_others_gained_later() -> None:
    curves = [((1, 0.2), (2, 0.4), (4, 0.6)), ((1, 0.3), (2, 0.5), (4, 0.6))]
    done = [Trial([], "done", 0.1, 0.7, curve=curves[0]), Trial([], "done", 0.2, 0.6, curve=curves[1])]
    eliminated = [Trial([], "eliminated", curve=((1, 0.1),)), Trial([], "eliminated", curve=((1, 0.3), (2, 0.25)))]
    lost = [Trial([], "diverged", curve=((1, 0.9),)), Trial([], "failed"), Trial([], "eliminated")]
    estimates = [0.7, 0.6, 0.1 + (0.5 + 0.3) / 2, 0.25 + (0.3 + 0.1) / 2, *[-math.inf] * 3]
    assert estimate_final_scores([*done, *eliminated, *lost]) == pytest.approx(estimates)
    assert estimate_final_scores(eliminated) == [0.1, 0.25]


def test_the_best_mean_of_two_seeds_wins() -> None:
    def done(rank: int, score: float, auroc: float) -> Trial:
        return Trial([f"adapter.rank={rank}"], "done", score, auroc)

    def chosen(first: list[Trial], second: list[Trial]) -> tuple[list[str], float] | None:
        best = best_repeated(first, second)
        return best and (best.setting, best.score)

    first = [done(8, 0.60, 0.70), done(2, 0.50, 0.90)]
    diverged = Trial(["adapter.rank=2"], "diverged")
    assert chosen(first, [done(8, 0.59, 0.70), done(2, 0.52, 0.90)]) == (["adapter.rank=8"], pytest.approx(0.595))
    assert chosen(first, [done(8, 0.30, 0.70), done(2, 0.52, 0.60)]) == (["adapter.rank=2"], pytest.approx(0.51))
    # The means differ by 0.02, and each of them by 0.02 from chance: AUROC decides.
    assert chosen(first, [done(8, 0.52, 0.70), done(2, 0.58, 0.80)]) == (["adapter.rank=2"], pytest.approx(0.54))
    assert chosen(first, [done(8, 0.30, 0.70), diverged]) == (["adapter.rank=8"], pytest.approx(0.45))
    assert chosen(first, [diverged]) is None


def test_time_counts_once_for_a_pack_and_not_between_processes() -> None:
    now = datetime.now(UTC)

    def trial(start: float, end: float) -> Trial:
        return Trial([], "done", period=(now - timedelta(hours=start), now - timedelta(hours=end)))

    began = now - timedelta(hours=1)
    trials = [trial(10, 9), trial(10, 8), trial(9.5, 9), trial(5, 4), trial(0.9, 0.1), Trial([], "interrupted")]
    assert seconds_spent(trials, began) == pytest.approx(3600 * (2 + 1 + 1), abs=60)


def test_a_trials_setting_is_read_from_its_job() -> None:
    job = ["adapter=lora", "data.report=false", "adapter.rank=2", "optimizer.lr=0.1"]
    assert setting_of([*job, "hydra.sweep.subdir=trials/3"]) == ["adapter.rank=2", "optimizer.lr=0.1"]
    assert setting_of([*job, "seed=4", "hydra.sweep.subdir=repeats/0"]) == ["adapter.rank=2", "optimizer.lr=0.1"]
    assert setting_of(["adapter=lora"]) == []
