"""Who goes on: the share that the schedule says, the best of them, and each as if nobody had been stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.training import loop
from lora_bench.training.halving import losers, places
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables, trainer

if TYPE_CHECKING:
    import pytest

    from lora_bench.adapters.pack import Pack


def test_of_eight_four_two_and_one_go_on() -> None:
    assert {step: left for step in range(1, 801) if (left := places(step, 800)) and left <= 4} == {
        100: 4,
        200: 2,
        400: 1,
    }


@given(st.integers(1, 10_000))
def test_fewer_and_fewer_go_on_and_one_is_left(steps: int) -> None:
    found = [left for step in range(1, steps + 1) if (left := places(step, steps)) is not None]
    assert found == sorted(found, reverse=True)
    assert steps == 1 or found[-1] == 1


@given(st.dictionaries(st.integers(0, 50), st.floats(-1, 1), min_size=1), st.integers(1, 60))
def test_the_best_go_on(scores: dict[int, float], left: int) -> None:
    stopped = losers(scores, left)
    kept = scores.keys() - set(stopped)
    assert len(kept) == min(left, len(scores))
    assert all(scores[k] >= scores[other] for k in kept for other in stopped)


def test_members_are_stopped_by_their_scores_and_who_is_left_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Pack:
        return pack("bert", *((adapter("lora", "rank=2"), seed) for seed in range(4)))

    judge = loop._judge

    def judged(pack: Pack, member: int, *arguments: Any) -> float:
        judge(pack, member, *arguments)
        return (0.1, 0.4, 0.3, 0.2)[member]

    monkeypatch.setattr(loop, "_judge", judged)
    halved, whole = made(), made()
    train, selection = tables(halved.backbone)
    settings, stopped = trainer(16, eval_every=4), []
    outcomes = loop.fit(
        halved, [optimizer()] * 4, settings, train, selection, halving=True, ended=lambda who: stopped.append([*who])
    )
    loop.fit(whole, [optimizer()] * 4, settings, train, selection)
    assert stopped == [[0, 3], [2], [1]]
    assert [(outcome.status, outcome.steps) for outcome in outcomes] == [
        ("stopped", 4),
        ("done", 16),
        ("stopped", 8),
        ("stopped", 4),
    ]
    halved.live = whole.live = [1]
    np.testing.assert_allclose(loop.predict(halved, selection, 8), loop.predict(whole, selection, 8), atol=1e-6)
    assert_close(halved.state(1), whole.state(1), atol=1e-6)
