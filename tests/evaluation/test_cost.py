"""The FLOPs of a training step equal what one counts by hand, and peak memory follows what is held.

By hand, for N rows of T tokens: a linear costs 2·in·out per token forward, as much again for the gradient of its
input and once more for that of its weight; attention costs 4·S·T·D forward, for S positions that ask, and twice that
backward, where more than 64 tokens cost 2·S·T·D once more. In the last layer only the first token asks, and only keys
and values are made of all.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_bench.adapters.methods.full import Full
from lora_bench.adapters.methods.head_only import HeadOnly
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.backbones.attention import KEPT_LENGTH
from lora_bench.evaluation.cost import FlopModel, peak_memory_bytes, reset_peak_memory
from lora_bench.training.dummy_step import StepFlops, dummy_step
from tests.adapters.tools import adapter
from tests.helpers import TINY

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.adapters.base import Adapter
    from lora_bench.backbones.base import Backbone

D, F, LAYERS, RANK = 32, 64, 2, 3  # tiny_bert: width, feed-forward width, layers; and the adapter's rank
LINEARS = [(D, D)] * 4 + [(D, F), (F, D)]  # (in, out) of query, key, value, output, feed-forward
BASE = sum(a * b for a, b in LINEARS)  # weights of one layer's linears
HEAD = D * D + 2 * D  # of the pooler and the classifier, which see the first token alone


def lora(layers: str = "all", rank: int = RANK) -> Adapter:
    return adapter("lora", f"rank={rank}", f"layers={layers}")


def tokens(length: int, *, last: bool) -> list[int]:
    """Return the number of tokens that a layer's linears process."""
    return [1, length, length, 1, 1, 1] if last else [length] * 6


def forward(rows: int, length: int, *, every: bool = False) -> int:
    """With `every`, the last layer makes every position: a prefix does."""
    total = 2 * HEAD
    for i in range(LAYERS):
        seen = tokens(length, last=i == LAYERS - 1 and not every)
        total += sum(2 * n * a * b for n, (a, b) in zip(seen, LINEARS, strict=True)) + 4 * seen[0] * length * D
    return rows * total


def lora_step(rows: int, length: int, adapted: int) -> int:
    """Forward and backward with LoRA on every linear of the last `adapted` layers."""
    total = 4 * HEAD
    for i in range(LAYERS - adapted, LAYERS):
        seen = tokens(length, last=i == LAYERS - 1)
        for position, (n, (a, b)) in enumerate(zip(seen, LINEARS, strict=True)):
            low_rank = RANK * (a + b)
            total += 2 * n * low_rank  # forward
            total += 2 * n * low_rank  # the gradients of A and B
            # The lowest adapted layer's query, key and value need no gradient of their input: nothing below is trained.
            unneeded = i == LAYERS - adapted and position < 3
            total += 2 * n * (RANK * b if unneeded else a * b + low_rank)
        total += (10 if length > KEPT_LENGTH else 8) * seen[0] * length * D
    return forward(rows, length) + rows * total


SHAPES = [(1, 8), (5, 33), (32, 128)]  # the last two are none of those that the model was fitted on


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize(("layers", "adapted"), [("all", 2), ("top:1", 1)])
def test_a_step_of_lora(backbone: Callable[..., Backbone], layers: str, adapted: int, rows: int, length: int) -> None:
    model = StepFlops.measure(Pack(backbone(), [Member(lora(layers), 0)]))
    assert model(rows, length) == pytest.approx(lora_step(rows, length, adapted), rel=1e-9)


@pytest.mark.parametrize(("rows", "length"), SHAPES)
def test_a_step_of_full_adds_the_weight_gradients(backbone: Callable[..., Backbone], rows: int, length: int) -> None:
    """Its dropout of attention saves what it drops, however many tokens there are."""
    model = StepFlops.measure(Pack(backbone(), [Member(Full(method="full", default_lr=1e-4, init_from=None), 0)]))
    assert model(rows, length) == pytest.approx(3 * forward(rows, length), rel=1e-9)


def test_lora_saves_about_a_third_of_full(backbone: Callable[..., Backbone]) -> None:
    full = StepFlops.measure(Pack(backbone(), [Member(Full(method="full", default_lr=1e-4, init_from=None), 0)]))
    small = StepFlops.measure(Pack(backbone(), [Member(lora(rank=1), 0)]))
    assert 0.25 < 1 - small(32, 16) / full(32, 16) < 0.42


@pytest.mark.parametrize(("rows", "length"), SHAPES)
def test_a_step_of_the_head_alone_goes_back_through_the_head_only(
    backbone: Callable[..., Backbone], rows: int, length: int
) -> None:
    model = StepFlops.measure(
        Pack(backbone(), [Member(HeadOnly(method="head_only", default_lr=1e-3, init_from=None), 0)])
    )
    head_backward = 2 * HEAD + 2 * 2 * D  # both weights, and the classifier's input
    assert model(rows, length) == pytest.approx(forward(rows, length, every=True) + rows * head_backward, rel=1e-9)


@pytest.mark.parametrize(("family", "checkpointed"), [*((family, False) for family in TINY), ("tiny_bert", True)])
def test_the_model_is_exact_on_unseen_shapes_for_every_family(
    backbone: Callable[..., Backbone], family: str, checkpointed: bool
) -> None:
    pack = Pack(backbone(family), [Member(lora(), 0)])
    pack.checkpoint_activations(checkpointed)
    model = StepFlops.measure(pack)
    for rows, length in ((3, 21), (2, 50), (2, 70)):
        with FlopCounterMode(display=False) as counter:
            dummy_step(pack, rows, length)
        assert model(rows, length) == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_a_pack_of_two_costs_two_suffixes(backbone: Callable[..., Backbone]) -> None:
    one = StepFlops.measure(Pack(backbone(), [Member(lora(), 0)]))
    two = StepFlops.measure(Pack(backbone(), [Member(lora(), 0), Member(lora(), 1)]))
    assert two(4, 16) == pytest.approx(2 * one(4, 16), rel=1e-9)


def test_a_product_of_weights_does_not_go_with_rows() -> None:
    a, b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 6))
    model = FlopModel.measure(lambda rows, length: torch.randn(rows * length, 4) @ (a @ b))
    assert model.coefficients == pytest.approx((2 * 4 * 3 * 6, 0, 2 * 4 * 6, 0), abs=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not let us reset the peak")
def test_peak_memory_follows_what_is_held() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not let us reset the peak")
    cpu, size = torch.device("cpu"), 200_000_000
    reset_peak_memory(cpu)
    before = peak_memory_bytes(cpu)
    held = np.ones(size, np.uint8)
    during = peak_memory_bytes(cpu)
    assert 0.9 * size < during - before < 1.2 * size
    del held
    assert peak_memory_bytes(cpu) > before + 0.9 * size  # it is the peak, not what is held now
    reset_peak_memory(cpu)
    assert peak_memory_bytes(cpu) < during - 0.8 * size


def test_peak_memory_is_of_this_process() -> None:
    assert 10_000_000 < peak_memory_bytes(torch.device("cpu")) < 1_000_000_000_000
