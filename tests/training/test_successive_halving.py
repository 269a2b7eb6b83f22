"""Who goes on: the share that the schedule says, the best of them, and each as if nobody had been stopped."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.training import loop
from lora_bench.training.prediction import predict
from lora_bench.training.signals import Interruption
from lora_bench.training.successive_halving import eliminated, members_by_step, rank_by, survivors
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables, trainer
from tests.training.tools import fit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_bench.adapters.pack.pack import Pack
    from lora_bench.training.member_run import MemberRun


def test_of_eight_four_two_and_one_go_on() -> None:
    changes = {step: survivors(step, 800) for step in range(2, 801) if survivors(step, 800) != survivors(step - 1, 800)}
    assert {step: limit for step, limit in changes.items() if limit <= 4} == {100: 4, 200: 2, 400: 1}


def test_eight_take_two_and_a_half_times_what_one_does() -> None:
    assert sum(members_by_step(8, 800)) == 8 * 100 + 4 * 100 + 2 * 200 + 400
    assert members_by_step(3, 8) == [3, 3, 2, 2, 1, 1, 1, 1]
    assert members_by_step(1, 3) == [1, 1, 1]


@given(st.integers(1, 10_000))
def test_fewer_and_fewer_go_on_and_one_is_left(steps: int) -> None:
    limits = [survivors(step, steps) for step in range(1, steps + 1)]
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == 1


SCORE = st.tuples(st.sampled_from([0.0, 0.1]) | st.floats(-1, 1), st.floats(0, 1))


@given(st.dictionaries(st.integers(0, 50), SCORE, min_size=1), st.integers(1, 60))
def test_the_best_go_on(scores: dict[int, tuple[float, float]], limit: int) -> None:
    stopped = eliminated(scores, limit)
    kept = scores.keys() - set(stopped)
    assert len(kept) == min(limit, len(scores))
    assert all(scores[k] >= scores[other] for k in kept for other in stopped)


def test_auroc_ranks_members_and_the_main_metric_those_without_it() -> None:
    ranked = [rank_by({"mcc": mcc, "auroc": auroc}, "mcc") for mcc, auroc in ((0.4, 0.8), (0.0, 0.81), (0.0, 0.5))]
    assert sorted(ranked) == [ranked[2], ranked[0], ranked[1]]
    assert rank_by({"spearman": 0.3}, "spearman") < rank_by({"spearman": 0.4}, "spearman")
    assert rank_by({"mcc": 0.3, "auroc": None}, "mcc") < rank_by({"mcc": 0.4, "auroc": None}, "mcc")


SCORES = ((0.4, 0.1), (0.1, 0.4), (0.2, 0.3), (0.3, 0.2))  # MCC, AUROC


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halving is told these, whatever the members score."""
    update_best = loop.update_best

    def scripted_line(member: MemberRun, *arguments: Any, **options: Any) -> dict[str, Any]:
        line = update_best(member, *arguments, **options)
        assert line is not None
        return line | {"metrics": dict(zip(("mcc", "auroc"), SCORES[member.index], strict=True))}

    monkeypatch.setattr(loop, "update_best", scripted_line)


def four() -> Pack:
    return pack("bert", *((adapter("lora", "rank=2"), seed) for seed in range(4)))


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("eval_every", [4, 5])
def test_members_are_stopped_by_their_scores_and_who_is_left_is_as_without(eval_every: int) -> None:
    """Also where halving looks at the selection split in between, which then chooses nothing and tries no patience."""
    halved, whole = four(), four()
    train, selection = tables(halved.backbone)
    settings, stopped = trainer(16, eval_every=eval_every), []
    outcomes = fit(
        halved, [optimizer()] * 4, settings, train, selection, halving=True, ended=lambda who: stopped.append([*who])
    )
    undisturbed = fit(whole, [optimizer()] * 4, settings, train, selection)[1]
    assert stopped == [[0, 3], [2], [1]]
    assert [(outcome.status, outcome.steps) for outcome in outcomes] == [
        ("eliminated", 4),
        ("done", 16),
        ("eliminated", 8),
        ("eliminated", 4),
    ]
    assert outcomes[1].without_gain == undisturbed.without_gain
    assert outcomes[1].best is not None
    assert undisturbed.best is not None
    assert outcomes[1].best["step"] == undisturbed.best["step"]
    halved.active = whole.active = [1]
    np.testing.assert_allclose(predict(halved, selection, 8), predict(whole, selection, 8), atol=1e-6)
    assert_close(halved.state(1), whole.state(1), atol=1e-6)


@pytest.mark.usefixtures("scripted")
def test_ctrl_c_in_the_step_that_stops_some_leaves_them_stopped() -> None:
    halved, interruption, stopped = four(), Interruption(), []
    train, selection = tables(halved.backbone)

    class Impatient:
        def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
            interruption.requested_signal = signal.SIGINT if step == 4 else None

        def evaluated(self, member: int, line: dict[str, Any]) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        fit(
            halved,
            [optimizer()] * 4,
            trainer(16, eval_every=4),
            train,
            selection,
            halving=True,
            watcher=Impatient(),
            ended=lambda who: stopped.append([*who]),
            interruption=interruption,
        )
    assert stopped == [[0, 3]]
