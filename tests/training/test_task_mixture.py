"""Task mixtures: the sequence of tasks, their shares of the batches, and one trained head per step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from lora_bench.adapters.pack.member import Member
from lora_bench.adapters.pack.pack import Pack
from lora_bench.data.batching import BatchPlan
from lora_bench.training.task_mixture import TaskData, TaskMixture, batches_per_task
from tests.adapters.tools import adapter, make, optimizer, tables, trainer
from tests.training.tools import fit_mixtures


@pytest.mark.parametrize(
    ("sizes", "temperature", "expected"),
    [
        ([2, 6, 12], 1.0, [2, 6, 12]),
        ([1, 9], 2.0, [3, 7]),  # 1 to 3: 2.5 and 7.5
        ([1, 1, 100], 1e9, [34, 34, 34]),
        ([5], 3.0, [5]),
    ],
)
def test_turns_go_with_size_and_temperature(sizes: list[int], temperature: float, expected: list[int]) -> None:
    assert batches_per_task(sizes, temperature).tolist() == expected


def two_tasks(size: int, seeds: tuple[int, ...] = (0,)) -> tuple[Pack, dict[str, TaskData]]:
    """A pack whose members have two heads, and two tasks of `size` and twice as many pairs."""
    a_pack = Pack(make("tiny_bert"), [Member(adapter("lora"), seed, outputs=(2, 2)) for seed in seeds])
    train, selection = tables(a_pack.backbone)
    rows = np.arange(3 * size)
    first, second = (train.take(chosen) for chosen in (rows[:size], rows[size:]))
    return a_pack, {
        "one": TaskData(first, selection),
        "other": TaskData(replace(second, head=1), replace(selection, head=1)),
    }


def test_an_epoch_has_every_pair_once_in_batches_of_one_task_for_any_seed() -> None:
    a_pack, tasks = two_tasks(8, seeds=(0, 1))
    course = TaskMixture([0, 1], tasks)
    assert course.steps_per_epoch(3) == 3 + 6
    assert course.steps(trainer(epochs=2, max_steps=None, batch_size=3)) == 18
    orders = {}
    for k in (0, 1):
        batches = list(islice(replace(course, members=[k]).batches(a_pack, 3), 9))
        orders[k] = [(batch.head, tuple(batch.input_ids.shape)) for batch in batches]
        for head, pairs in enumerate(tasks.values()):
            tokens = Counter(
                tuple(row[mask.bool()].tolist())
                for batch in batches
                if batch.head == head
                for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
            )
            table = pairs.train
            starts = zip(table.offsets.tolist(), table.lengths.tolist(), strict=True)
            assert tokens == Counter(tuple(table.values[at : at + n].tolist()) for at, n in starts)
    assert orders[0] == orders[1]  # members of other seeds have steps of the same shapes


def test_a_warmer_course_comes_to_the_small_task_more_often() -> None:
    a_pack, tasks = two_tasks(8)
    heads = [batch.head for batch in islice(TaskMixture([0], tasks, temperature=1e6).batches(a_pack, 2), 12)]
    assert Counter(heads) == {0: 6, 1: 6}  # 4 and 8 by size


def test_a_step_teaches_the_adapter_and_the_head_of_its_task() -> None:
    a_pack, tasks = two_tasks(8)
    before = a_pack.state(0)
    assert before.keys() == a_pack.state(0, 0).keys() | {f"head_1.{name}" for name in a_pack.head_parameters(0, 1)}
    head = next(TaskMixture([0], tasks).batches(a_pack, 8)).head
    settings = trainer(epochs=1, max_steps=1, batch_size=8)
    fit_mixtures(a_pack, [optimizer(1e-2)], settings, [TaskMixture([0], tasks)])
    after = a_pack.state(0)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    heads = {name for name in after if name.removeprefix("head_1.") in a_pack.head_parameters(0, 0)}
    assert moved & heads == {name for name in heads if name.startswith("head_1.") == (head == 1)}
    assert moved - heads


def test_members_with_tasks_of_their_own_learn_what_they_learn_alone() -> None:
    """Mixtures of different sizes: one member ends while the other still trains."""
    settings = trainer(epochs=2, max_steps=None, batch_size=4, eval_every=None)
    alone = {}
    for name in ("one", "other"):
        a_pack, tasks = two_tasks(8)
        a_pack.detach()
        single = Pack(a_pack.backbone, [Member(adapter("lora"), 0)])
        pairs = TaskData(*(replace(table, head=0) for table in (tasks[name].train, tasks[name].selection)))
        (outcome,) = fit_mixtures(single, [optimizer(1e-2)], settings, [TaskMixture([0], {name: pairs})])
        alone[name] = single.state(0), outcome
    a_pack, tasks = two_tasks(8)
    a_pack.detach()
    both = Pack(a_pack.backbone, [Member(adapter("lora"), 0), Member(adapter("lora"), 0)])
    courses = [
        TaskMixture([k], {name: TaskData(replace(pairs.train, head=0), replace(pairs.selection, head=0))})
        for k, (name, pairs) in enumerate(tasks.items())
    ]
    outcomes = fit_mixtures(both, [optimizer(1e-2)] * 2, settings, courses)
    for k, name in enumerate(("one", "other")):
        state, outcome = alone[name]
        assert (outcomes[k].steps, outcomes[k].pairs, outcomes[k].tokens) == (
            outcome.steps,
            outcome.pairs,
            outcome.tokens,
        )
        for key, tensor in both.state(k).items():
            torch.testing.assert_close(tensor, state[key], atol=1e-4, rtol=0)
    assert outcomes[0].steps < outcomes[1].steps


def test_a_plan_looks_at_both_orders_of_a_pair() -> None:
    _, tasks = two_tasks(8)
    train = tasks["one"].train
    longer = replace(train, lengths=train.lengths + 1)
    plan = TaskData(train, train, longer).plan(4)
    assert isinstance(plan, BatchPlan)
    assert plan.lengths.tolist() == longer.lengths.tolist()
