"""Batches hold every row once, in an order that the seed fixes and in shapes that it does not; nothing is lost in them.

Members of a pack with unlike seeds travel together only because shapes are the data's alone.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.data.batching import (
    LENGTH_RATIO,
    SMALLEST_BUCKET,
    Batch,
    BatchPlan,
    collate,
    evaluation_batches,
    micro_batches,
    training_batches,
)
from lora_bench.data.tokenization import TokenTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAD = 7
LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=120)
BATCH_SIZES = st.integers(1, 9)
quick = settings(deadline=None, max_examples=60)


def table_of(lengths: list[int] | NDArray[np.int64], *, types: bool = True, labels: bool = True) -> TokenTable:
    """Rows of these lengths; each holds its own number as its first token, so that it can be told anywhere."""
    sizes = np.asarray(lengths, np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    values = np.random.default_rng(0).integers(8, 90, sizes.sum()).astype(np.int32)
    values[offsets] = np.arange(len(sizes)) + 1000
    return TokenTable(
        values=values,
        offsets=offsets,
        lengths=sizes,
        types=(values % 2).astype(np.int8) if types else None,
        labels=np.arange(len(sizes)) % 2 if labels else None,
        ids=np.arange(len(sizes)),
        truncated=0,
    )


def rows_of(batch: Batch) -> list[int]:
    return (batch.input_ids[:, 0] - 1000).tolist()


def shapes(batches: list[Batch]) -> list[tuple[int, int]]:
    return [(batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in batches]


@quick
@given(LENGTHS, BATCH_SIZES, st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_row_once(lengths: list[int], size: int, seed: int, epoch: int) -> None:
    plan = BatchPlan(np.array(lengths), size)
    batches = list(training_batches(table_of(lengths), plan, [seed], epoch, PAD))
    assert sorted(row for batch in batches for row in rows_of(batch)) == list(range(len(lengths)))
    assert len(batches) == plan.steps_per_epoch == -(-len(lengths) // size)
    assert all(len(batch.input_ids) <= size for batch in batches)
    assert sum(len(batch.input_ids) < size for batch in batches) <= 1
    for batch in batches:
        assert batch.input_ids.shape[1] >= max(lengths[row] for row in rows_of(batch))


@quick
@given(LENGTHS, BATCH_SIZES, st.lists(st.integers(0, 5), min_size=2, max_size=3), st.integers(0, 3))
def test_shapes_are_the_datas_alone(lengths: list[int], size: int, seeds: list[int], epoch: int) -> None:
    table, plan = table_of(lengths), BatchPlan(np.array(lengths), size)
    alone = [list(training_batches(table, plan, [seed], epoch, PAD)) for seed in seeds]
    assert all(shapes(batches) == shapes(alone[0]) for batches in alone)
    together = list(training_batches(table, plan, seeds, epoch, PAD))
    if len(set(seeds)) == 1:
        assert [rows_of(batch) for batch in together] == [rows_of(batch) for batch in alone[0]]
        return
    for i, batch in enumerate(together):  # member by member what each would have seen alone
        assert batch.members == len(seeds)
        assert rows_of(batch) == [row for batches in alone for row in rows_of(batches[i])]


def order(seed: int, epoch: int) -> list[list[int]]:
    lengths = np.random.default_rng(1).integers(3, 40, 300)
    batches = training_batches(table_of(lengths), BatchPlan(lengths, 8), [seed], epoch, PAD)
    return [rows_of(batch) for batch in batches]


def test_seed_and_epoch_fix_the_order_and_change_it() -> None:
    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(3, 2)
    assert sorted(order(3, 1)) != sorted(order(4, 1))  # other pairs meet, not only other batches first


def test_long_and_short_batches_are_mixed() -> None:
    lengths = np.sort(np.random.default_rng(2).integers(3, 200, 2000))
    tops = [batch.input_ids.shape[1] for batch in training_batches(table_of(lengths), BatchPlan(lengths, 8), [0], 0, 0)]
    half = len(tops) // 2
    assert abs(np.mean(tops[:half]) - np.mean(tops[half:])) < 30  # not all the short ones first


def test_padding_is_a_small_share_on_lengths_as_questions_have_them() -> None:
    lengths = np.clip(np.random.default_rng(3).lognormal(3.3, 0.45, 5000), 6, 128).astype(np.int64)
    table, plan = table_of(lengths), BatchPlan(lengths, 32)
    for batches in (
        list(training_batches(table, plan, [0], 0, PAD)),
        [batch for _, batch in evaluation_batches(table, 128, PAD)],
    ):
        cells = sum(batch.input_ids.numel() for batch in batches)
        kept = sum(int(batch.attention_mask.sum()) for batch in batches)
        assert kept == lengths.sum()
        assert 1 - kept / cells < 0.1


@quick
@given(LENGTHS, BATCH_SIZES)
def test_buckets_are_whole_batches_of_like_lengths(lengths: list[int], size: int) -> None:
    sizes = np.array(lengths)
    buckets = BatchPlan(sizes, size).buckets()
    assert sorted(np.concatenate(buckets).tolist()) == list(range(len(lengths)))
    assert all(len(bucket) % size == 0 for bucket in buckets[:-1])
    for bucket in buckets:
        if len(bucket) > SMALLEST_BUCKET * size:
            assert sizes[bucket].max() <= LENGTH_RATIO * sizes[bucket].min()
    for bucket, following in pairwise(buckets):
        assert sizes[bucket].max() <= sizes[following].min()


@quick
@given(LENGTHS, st.data(), st.booleans(), st.integers(0, 6))
def test_collate_is_a_plain_loop_over_rows(lengths: list[int], data: st.DataObject, types: bool, spare: int) -> None:
    table = table_of(lengths, types=types, labels=types)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=9)))
    length = int(table.lengths[rows].max()) + spare
    batch = collate(table, rows, length, PAD)
    for place, row in enumerate(rows.tolist()):
        start, n = int(table.offsets[row]), lengths[row]
        padding = length - n
        assert batch.input_ids[place].tolist() == table.values[start : start + n].tolist() + [PAD] * padding
        assert batch.attention_mask[place].tolist() == [1] * n + [0] * padding
        if types:
            assert table.types is not None
            assert batch.token_type_ids is not None
            assert batch.token_type_ids[place].tolist() == table.types[start : start + n].tolist() + [0] * padding
    assert (batch.token_type_ids is None) == (not types)
    assert (None if batch.labels is None else batch.labels.tolist()) == ((rows % 2).tolist() if types else None)
    assert batch.full == bool((batch.attention_mask == 1).all())
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64


@quick
@given(LENGTHS, BATCH_SIZES)
def test_evaluation_covers_every_row_once_longest_first(lengths: list[int], size: int) -> None:
    seen: list[int] = []
    tops = []
    for rows, batch in evaluation_batches(table_of(lengths, labels=False), size, PAD):
        assert rows_of(batch) == rows.tolist()
        assert batch.input_ids.shape[1] == max(lengths[row] for row in rows)  # no longer than it need be
        seen += rows.tolist()
        tops.append(batch.input_ids.shape[1])
    assert sorted(seen) == list(range(len(lengths)))
    assert tops == sorted(tops, reverse=True)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 100])
def test_micro_batches_partition_each_members_rows(members: int, rows: int) -> None:
    seeds = list(range(members))
    lengths = np.random.default_rng(5).integers(2, 12, 8)
    (batch,) = training_batches(table_of(lengths), BatchPlan(lengths, 8), seeds, 0, PAD)
    parts = list(micro_batches(batch, rows))
    assert len(parts) == -(-8 // rows)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        whole = getattr(batch, name).view(members, 8, -1)
        pieces = [getattr(part, name).view(members, len(part.input_ids) // members, -1) for part in parts]
        assert all(piece.shape[1] <= rows for piece in pieces)
        assert torch.equal(torch.cat(pieces, 1), whole)
    assert all(part.members == members for part in parts)


def test_micro_batches_without_types_and_labels() -> None:
    table = replace(table_of([3, 4, 5], types=False), labels=None)
    batch = collate(table, np.arange(3), 5, PAD)
    assert [len(part.input_ids) for part in micro_batches(batch, 2)] == [2, 1]
    assert all(part.labels is None and part.token_type_ids is None for part in micro_batches(batch, 2))


def test_repeat_gives_each_member_the_same_rows() -> None:
    batch = collate(table_of([3, 5]), np.array([1, 0]), 5, PAD).repeat(3)
    assert batch.members == 3
    assert rows_of(batch) == [1, 0] * 3
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0] * 3
    assert batch.to(torch.device("cpu")) is batch


@given(LENGTHS, BATCH_SIZES)
@quick
def test_padding_is_what_the_rows_of_each_member_leave_of_its_batches(lengths: list[int], batch_size: int) -> None:
    table = table_of(lengths)
    for seeds, copies in (([0], 1), ([3, 3], 2), ([0, 1, 2], 3)):
        batches = list(training_batches(table, BatchPlan(table.lengths, batch_size), seeds, 0, PAD, table))
        padding = [sum(each) for each in zip(*(batch.padding(copies) for batch in batches), strict=True)]
        tokens = sum(batch.orders * batch.pairs * batch.input_ids.shape[1] for batch in batches)
        assert padding == [tokens - 2 * sum(lengths)] * copies  # each row once, in both orders


def test_lengths_are_rounded_up_as_far_as_pairs_are_so_long() -> None:
    plan = BatchPlan(np.arange(9, 31), 4, multiple=8)
    lengths = {length for _, length in plan.epoch(0, [0])}
    assert lengths <= {16, 24, 30}
    assert [plan.padded_length(n) for n in (9, 16, 17, 25, 30)] == [16, 16, 24, 30, 30]
    assert plan.padded_length(40) == 40  # a perturbed pair
