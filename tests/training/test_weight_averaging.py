"""Averaged weights are the mean of the latest steps' weights at any time; training never notices that they are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_bench.config.build import build
from lora_bench.config.schema import Trainer
from lora_bench.errors import Code
from lora_bench.evaluation.metrics import score
from lora_bench.training.prediction import predict
from lora_bench.training.weight_averaging import WeightAverage, averaged_weights
from tests.adapters.tools import adapter, assert_close, optimizer, pack, tables, train, trainer
from tests.command_line import refuses
from tests.helpers import composed
from tests.training import test_loop as loop_tests
from tests.training.test_loop import spy

if TYPE_CHECKING:
    from lora_bench.adapters.pack.pack import Pack
    from tests.training.test_loop import Make

State = dict[str, Tensor]


class Keeper:
    """A watcher that copies every member's tensors after each step and at each evaluation."""

    def __init__(self, watched: Pack) -> None:
        self.pack = watched
        self.stepwise: list[list[State]] = [[] for _ in range(watched.size)]
        self.scored: list[dict[int, State]] = [{} for _ in range(watched.size)]
        self.mcc: list[list[float]] = [[] for _ in range(watched.size)]

    def stepped(self, step: int, losses: Any, pairs: int) -> None:
        for k, states in enumerate(self.stepwise):
            states.append(self.pack.state(k))

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        self.scored[member][line["step"]] = self.pack.state(member)
        self.mcc[member].append(line["metrics"]["mcc"])


def mean(states: list[State], share: float = 1.0) -> State:
    """Written out: the weight of step i of t, from 1, is what it came with times what each later step left of it."""
    eta, t = 2 / share - 2, len(states)
    came = [(eta + 1) / (i + eta) for i in range(1, t + 1)]
    weights = torch.tensor([c * np.prod([1 - later for later in came[i + 1 :]]) for i, c in enumerate(came)])
    return {
        name: (torch.stack([state[name].double() for state in states]) * weights.view(-1, *[1] * states[0][name].ndim))
        .sum(0)
        .float()
        for name in states[0]
    }


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1])
def test_it_lies_as_far_back_as_the_mean_of_the_last_share_of_the_steps(share: float) -> None:
    p = nn.Parameter(torch.zeros(1))
    average = WeightAverage([p], share)
    for step in range(1, 2001):
        p.data.fill_(step)
        average.update()
        if step in (400, 2000):
            assert average.means[p].item() == pytest.approx((1 - share / 2) * step, rel=0.01)


def test_the_mean_is_kept_in_fp32_whatever_the_weights_are() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    average, seen = WeightAverage([p]), []
    for i in range(7):
        p.data.fill_(1 + i / 128)  # neighbours in bf16
        seen.append(p.detach().double())
        average.update()
    (kept,) = average.means.values()
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept.double(), torch.stack(seen).mean(0), atol=1e-6, rtol=0)


def test_weights_come_back_bitwise_whatever_happens_within() -> None:
    p, untouched = nn.Parameter(torch.tensor([0.1, torch.nan, -0.0])), nn.Parameter(torch.ones(2))
    average = WeightAverage([p])
    p.data[1] = 4.0
    average.update()
    p.data.copy_(torch.tensor([0.3, torch.nan, -0.0]))
    before = p.detach().clone().view(torch.int32)

    def fail() -> None:
        with averaged_weights([average, WeightAverage([untouched])]):
            assert p.tolist() == pytest.approx([0.1, 4.0, 0.0])
            assert untouched.tolist() == [1.0, 1.0]
            assert torch.is_grad_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert torch.equal(p.detach().view(torch.int32), before)
    assert p.requires_grad


@pytest.mark.parametrize("form", ["bert", "t5"])
def test_what_is_kept_is_the_mean_of_the_latest_steps(form: str) -> None:
    a_pack = pack(form, (adapter("lora", "rank=2"), 0), (adapter("lora", "rank=4"), 1))
    keeper = Keeper(a_pack)
    outcomes, states = train(a_pack, settings=trainer(10, average=0.35), watcher=keeper)
    selection = tables(a_pack.backbone)[1]
    scores = predict(a_pack, selection, 32)
    for k, outcome in enumerate(outcomes):
        expected = mean(keeper.stepwise[k], 0.35)
        assert outcome.best is not None
        assert same(outcome.state, states[k])
        assert_close(states[k], expected, 1e-7)
        assert max(float((states[k][n] - keeper.stepwise[k][-1][n]).abs().max()) for n in expected) > 1e-3
        assert selection.labels is not None
        assert score(scores[k], selection.labels, {}) == outcome.best["metrics"]  # the mean was scored, too


def test_every_look_sees_the_mean_so_far() -> None:
    a_pack = pack("bert", (adapter("lora"), 0))
    keeper = Keeper(a_pack)
    ((outcome,), (states,)) = train(a_pack, settings=trainer(9, average=0.5, eval_every=2), watcher=keeper)
    steps, looks = keeper.stepwise[0], keeper.scored[0]
    assert list(looks) == [2, 4, 6, 8, 9]
    for step, scored in looks.items():
        assert_close(scored, mean(steps[:step], 0.5), 1e-7)
    best = list(looks)[int(np.argmax(keeper.mcc[0]))]
    assert outcome.best is not None
    assert outcome.best["step"] == best
    assert same(states, looks[best])


@pytest.mark.parametrize("method", ["lora", "full", "head_only"])
def test_training_goes_its_way_bitwise(method: str) -> None:
    options = ["dropout=0.2"] if method == "lora" else []
    trajectories = []
    for average in (0.0, 1.0):
        torch.manual_seed(0)  # of the network's own dropout
        a_pack = pack("bert", (adapter(method, *options), 0))
        keeper = Keeper(a_pack)
        train(a_pack, settings=trainer(7, average=average, eval_every=2), watcher=keeper)
        trajectories.append(keeper.stepwise[0])
    assert len(trajectories[0]) == 7
    assert all(same(one, other) for one, other in zip(*trajectories, strict=True))


def test_a_member_is_averaged_as_it_would_be_alone() -> None:
    members = [(adapter("lora", "rank=2"), 0), (adapter("lora", "rank=4"), 1), (adapter("head_only"), 0)]
    rates = [optimizer(1e-2), optimizer(3e-3), optimizer(1e-2)]
    settings = trainer(8, average=0.5)
    _, together = train(pack("bert", *members), rates, settings)
    for k, member in enumerate(members):
        _, (alone,) = train(pack("bert", member), [rates[k]], settings)
        assert_close(together[k], alone, 1e-4)


def test_one_that_diverges_and_one_that_stops_leave_the_others_mean_alone(backbone: Make) -> None:
    """The middle one overflows, the last one stands still and stops; both while averages are taken."""
    chosen = loop_tests.trainer(epochs=12, average=1.0, eval_every=6, early_stopping_patience=2)
    rates = [
        loop_tests.optimizer(),
        loop_tests.optimizer(lr=1e30, grad_clip_norm=None),
        loop_tests.optimizer(lr=1e-12),
    ]
    a_pack = loop_tests.packed(backbone(), spy(), spy(), spy(), seeds=(0, 0, 0))
    keeper = Keeper(a_pack)
    fine, broken, still = loop_tests.run(a_pack, chosen=chosen, learn=rates, watcher=keeper)
    assert (broken.status, broken.state) == ("diverged", {})
    assert (still.status, still.steps) == ("done", 18)
    assert_close(a_pack.state(2), mean(keeper.stepwise[2][:6]), 1e-7)
    lone = loop_tests.packed(backbone(), spy())
    (alone,) = loop_tests.run(lone, chosen=chosen)
    assert (fine.status, fine.steps) == (alone.status, alone.steps)
    assert fine.steps > 18
    assert_close(a_pack.state(0), lone.state(0), 1e-4)


def test_what_is_not_settled_does_not_count() -> None:
    a_pack = pack("bert", (spy(unsettled=4), 0), (spy(), 0))
    keeper = Keeper(a_pack)
    _, (late, soon) = train(a_pack, settings=trainer(8, average=0.75), watcher=keeper)
    assert_close(late, mean(keeper.stepwise[0][4:], 0.75), 1e-7)
    assert_close(soon, mean(keeper.stepwise[1], 0.75), 1e-7)


def test_only_a_share_is_taken() -> None:
    assert build(Trainer, composed("trainer.average=0.25").trainer, "trainer").average == 0.25
    for wrong in ("-0.1", "1.5", "nan"):
        with refuses(Code.INVALID_VALUE, key="trainer.average") as caught:
            build(Trainer, composed(f"trainer.average={wrong}").trainer, "trainer")
        assert str(caught.value.value) == wrong
