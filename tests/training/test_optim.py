"""The optimizer is AdamW as published, its rate follows the schedule, vectors are not decayed, members step apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.adapters.methods.full import Full
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.config.schema import Optimizer
from lora_bench.training.optim import learning_rate_factor, make_optimizer, set_learning_rate
from tests.adapters.tools import adapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.adapters.base import Adapter
    from lora_bench.backbones.base import Backbone

SETTINGS = Optimizer(
    lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6, warmup=0.1, schedule="linear", grad_clip_norm=None
)


def lora(**changed: Any) -> Adapter:
    return replace(adapter("lora", "rank=2", "alpha=4", "target_modules=qv"), **changed)


@pytest.mark.parametrize("member", [0, 1])
def test_steps_are_adamw_as_published(backbone: Callable[..., Backbone], member: int) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, written out in float64."""
    pack = Pack(backbone(), [Member(lora(), 0), Member(lora(), 1)])
    trainable, other = pack.trainable(member), pack.state(1 - member)
    optimizer = make_optimizer(SETTINGS, pack, member)
    start = {name: p.detach().double().clone() for name, p in trainable.items()}
    expected = {name: value.clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in start.items()}
    second = {name: torch.zeros_like(value) for name, value in start.items()}
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 6):
        set_learning_rate(optimizer, SETTINGS, t, 5)
        rate = SETTINGS.lr * learning_rate_factor(SETTINGS, t, 5)
        for name, p in trainable.items():
            p.grad = torch.randn(p.shape, generator=generator)
            g = p.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            decay = 0.1 if p.ndim > 1 else 0.0
            moment, scale = first[name] / (1 - 0.8**t), (second[name] / (1 - 0.95**t)).sqrt() + 1e-6
            expected[name] = expected[name] - rate * decay * expected[name] - rate * moment / scale
        optimizer.step()
    for name, p in trainable.items():
        torch.testing.assert_close(p.detach().double(), expected[name], atol=1e-6, rtol=1e-5, msg=name)
        assert not torch.equal(p.detach().double(), start[name])
    for name, value in pack.state(1 - member).items():
        assert torch.equal(value, other[name])


def test_every_trained_tensor_is_in_one_group_and_vectors_are_not_decayed(backbone: Callable[..., Backbone]) -> None:
    for family in ("tiny_bert", "tiny_t5"):
        for method in (lora(), Full(method="full", default_lr=1e-4, init_from=None)):
            pack = Pack(backbone(family), [Member(method, 0)])
            groups = make_optimizer(SETTINGS, pack, 0).param_groups
            held = [id(p) for group in groups for p in group["params"]]
            assert sorted(held) == sorted(id(p) for p in pack.trainable(0).values())
            for group in groups:
                for p in group["params"]:
                    assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
                    assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-6, 1e-2)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_weights_of_pair_features_are_decayed_for_any_number_of_classes(
    backbone: Callable[..., Backbone], outputs: int
) -> None:
    pack = Pack(backbone(), [Member(lora(), 0, outputs=[outputs], pair_features=True)])
    decay = {
        id(p): group["weight_decay"]
        for group in make_optimizer(SETTINGS, pack, 0).param_groups
        for p in group["params"]
    }
    head = {name: decay[id(p)] for name, p in pack.head_parameters(0).items()}
    assert head["matching.weight"] == head["classifier.weight"] == 0.1
    assert head["matching.bias"] == head["classifier.bias"] == 0.0


def test_the_ratio_of_lora_plus_touches_one_factor_alone_and_keeps_its_decay(backbone: Callable[..., Backbone]) -> None:
    pack = Pack(backbone(), [Member(lora(lr_ratio=16.0, magnitude=True), 0)])
    optimizer = make_optimizer(SETTINGS, pack, 0)
    names = {id(p): name for name, p in pack.trainable(0).items()}
    for step in (1, 30, 100):
        set_learning_rate(optimizer, SETTINGS, step, 100)
        for group in optimizer.param_groups:
            for p in group["params"]:
                ratio = 16 if names[id(p)].endswith(".lora_B") else 1
                assert group["lr"] / learning_rate_factor(SETTINGS, step, 100) == pytest.approx(0.01 * ratio)
                assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_the_rate_climbs_linearly_then_follows_the_schedule() -> None:
    linear = [learning_rate_factor(SETTINGS, step, 100) for step in range(1, 101)]
    assert linear[:10] == pytest.approx([k / 10 for k in range(1, 11)])
    assert linear[9:] == pytest.approx([1 - k / 91 for k in range(91)])
    assert linear[-1] < 0.02
    cosine = [learning_rate_factor(replace(SETTINGS, schedule="cosine"), step, 100) for step in range(1, 101)]
    assert cosine[:10] == linear[:10]
    assert cosine[54] == pytest.approx(0.5, abs=0.02)
    assert cosine[-1] < 0.001
    constant = [learning_rate_factor(replace(SETTINGS, schedule="constant"), step, 100) for step in range(1, 101)]
    assert constant[:10] == linear[:10]
    assert constant[10:] == [1.0] * 90


def test_without_warm_up_the_first_step_is_almost_the_peak() -> None:
    for schedule in ("linear", "cosine", "constant"):
        assert learning_rate_factor(replace(SETTINGS, warmup=0.0, schedule=schedule), 1, 1000) == pytest.approx(
            1, abs=0.002
        )


def test_a_warm_up_that_ends_within_a_step_is_rounded_up() -> None:
    """A tenth of 15 steps is 1.5: the learning rate rises for two steps and falls from the third on."""
    assert [learning_rate_factor(SETTINGS, step, 15) for step in (1, 2, 3)] == pytest.approx([0.5, 1, 1 - 1 / 14])
    short = replace(SETTINGS, schedule="constant", warmup=0.01)
    assert [learning_rate_factor(short, step, 101) for step in (1, 2, 3)] == pytest.approx([0.5, 1, 1])
    assert learning_rate_factor(short, 1, 5) == 1


@settings(deadline=None)
@given(steps=st.integers(1, 200), warmup=st.floats(0, 1), schedule=st.sampled_from(["linear", "cosine", "constant"]))
def test_every_step_learns_and_none_above_the_peak(steps: int, warmup: float, schedule: str) -> None:
    chosen = replace(SETTINGS, warmup=warmup, schedule=schedule)
    factors = [learning_rate_factor(chosen, step, steps) for step in range(1, steps + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])  # up, then never up again
    assert factors[top:] == sorted(factors[top:], reverse=True)
