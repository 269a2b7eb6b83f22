"""All members at once, the route of a GPU: each learns what it would alone, by far fewer calls of operators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lora_bench.adapters.pack.batched_lora import BatchedLoRA
from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from tests.adapters.tools import adapter, assert_close, doubled, optimizer, pack, stir, tables, train, trainer
from tests.backbones.tools import FORMS, make, random_batch
from tests.training.tools import fit, prepare

if TYPE_CHECKING:
    from lora_bench.adapters.base import Adapter

lora = partial(adapter, "lora")
WIDE = trainer(3, micro_batch_size=1000)
PACKS: dict[str, list[Adapter]] = {
    "unlike ranks": [lora("rank=16"), lora("rank=1"), lora("rank=2"), lora("rank=8")],
    "dropout": [lora("dropout=0.3"), lora("dropout=0.1"), lora("dropout=0.3", "rank=4")],
    "magnitude": [adapter("dora"), adapter("dora", "rank=3"), adapter("dora", "rank=32")],
    "subtracted starts": [adapter("pissa"), adapter("olora", "rank=4")],
    "one factor frozen": [adapter("lora_fa"), adapter("lora_fa", "rank=4")],
    "all kinds": [
        adapter("vera"),
        lora(),
        adapter("dora"),
        lora("rank=4", "target_modules=qv"),
        adapter("dora", "init=pissa"),
        adapter("qlora"),
        lora("layers=top:1"),
        adapter("adalora"),
        adapter("dora"),
    ],
}


def together(form: str, settings: list[Adapter]) -> Pack:
    return Pack(make(*FORMS[form]), [Member(one, seed) for seed, one in enumerate(settings)], batched=True)


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("form", ["bert", "t5"])
def test_members_learn_what_they_would_alone(form: str, name: str) -> None:
    settings = PACKS[name] + [adapter("head_only")] * (name == "all kinds" and form == "bert")
    _, ends = train(doubled(together(form, settings)), settings=WIDE)
    for seed, (one, end) in enumerate(zip(settings, ends, strict=True)):
        _, (alone,) = train(doubled(pack(form, (one, seed))), settings=WIDE)
        assert_close(end, alone, atol=1e-5)


def test_in_fp32_a_pass_gives_what_members_give_alone_in_their_own_order() -> None:
    settings = PACKS["unlike ranks"]
    made = stir(together("bert", settings)).eval()
    batch = random_batch(made.backbone)
    with torch.no_grad():
        found = made(batch.repeat(4))
        for k in range(4):
            with made.only([k]):
                torch.testing.assert_close(found[k], made(batch)[0], atol=1e-5, rtol=0)


def test_micro_batches_add_up_and_members_that_end_leave_the_others() -> None:
    settings = [lora(), lora("rank=4"), lora("rank=2")]
    wild = replace(optimizer(1e18), grad_clip_norm=None)
    outcomes, ends = train(
        doubled(together("bert", settings)), [optimizer(), wild, optimizer()], trainer(3, micro_batch_size=3)
    )
    assert [outcome.status for outcome in outcomes] == ["done", "diverged", "done"]
    for k in (0, 2):
        _, (alone,) = train(doubled(pack("bert", (settings[k], k))), settings=WIDE)
        # Portions add up in another order in the fp32 head, and Adam divides a tiny gradient by its own size.
        assert_close(ends[k], alone, atol=5e-4)


def test_very_unlike_ranks_are_not_all_padded_to_the_largest() -> None:
    made = together("bert", [lora(f"rank={rank}") for rank in (1, 2, 4, 8, 16, 32)])
    first = next(iter(made.updates[0]))
    sizes = BatchedLoRA([made.updates[k][first] for k in range(6)]).sizes  # type: ignore[misc]
    assert sizes == [4, 2]


def operator_calls(made: Pack, steps: int) -> int:
    """Operators called in a training of so many steps, those that they call themselves not counted."""
    learned, selection = tables(made.backbone)
    settings = trainer(steps, micro_batch_size=1000)
    prepare(made, settings, learned)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        fit(made, [optimizer()] * made.size, settings, learned, selection)
    calls = 0
    for event in profiled.events():
        above = event.cpu_parent
        while above is not None and not above.name.startswith("aten::"):
            above = above.cpu_parent
        calls += event.name.startswith("aten::") and above is None
    return calls


def calls_of_a_step(settings: list[Adapter]) -> float:
    more, fewer = (operator_calls(together("bert", settings), steps) for steps in (2, 1))
    return more - fewer


def test_a_step_of_eight_members_calls_a_fifth_of_their_operators() -> None:
    """Forward, backward, clipping and the optimizer's step."""
    alone = calls_of_a_step([lora()])
    assert 8 * alone >= 5 * calls_of_a_step([lora()] * 8)
    assert 8 * alone >= 4 * calls_of_a_step([lora(f"rank={rank}") for rank in (1, 2, 4, 8, 8, 16, 16, 32)])
