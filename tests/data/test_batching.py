"""Batches hold every row once; the seed determines the order of rows, the data alone the shapes of batches.

Members of a pack with different seeds share batches only because the shapes do not depend on the seed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_bench.data.batching import (
    EVALUATION_TOKENS,
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
    """Return a table with rows of these lengths; the first token of row i is 1000 + i, which identifies the row."""
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
def test_shapes_do_not_depend_on_the_seed(lengths: list[int], size: int, seeds: list[int], epoch: int) -> None:
    table, plan = table_of(lengths), BatchPlan(np.array(lengths), size)
    batches_by_seed = [list(training_batches(table, plan, [seed], epoch, PAD)) for seed in seeds]
    assert all(shapes(batches) == shapes(batches_by_seed[0]) for batches in batches_by_seed)
    shared_batches = list(training_batches(table, plan, seeds, epoch, PAD))
    if len(set(seeds)) == 1:
        assert [rows_of(batch) for batch in shared_batches] == [rows_of(batch) for batch in batches_by_seed[0]]
        return
    for i, batch in enumerate(shared_batches):  # each member has the rows of its single run
        assert batch.members == len(seeds)
        assert rows_of(batch) == [row for batches in batches_by_seed for row in rows_of(batches[i])]


def order(seed: int, epoch: int) -> list[list[int]]:
    lengths = np.random.default_rng(1).integers(3, 40, 300)
    batches = training_batches(table_of(lengths), BatchPlan(lengths, 8), [seed], epoch, PAD)
    return [rows_of(batch) for batch in batches]


def test_order_of_rows_depends_on_seed_and_epoch_only() -> None:
    assert order(3, 1) == order(3, 1)
    assert order(3, 1) != order(4, 1)
    assert order(3, 1) != order(3, 2)
    assert sorted(order(3, 1)) != sorted(order(4, 1))  # batches hold other rows, not only in another order


def test_long_and_short_batches_are_mixed() -> None:
    lengths = np.sort(np.random.default_rng(2).integers(3, 200, 2000))
    lengths_of_batches = [
        batch.input_ids.shape[1] for batch in training_batches(table_of(lengths), BatchPlan(lengths, 8), [0], 0, 0)
    ]
    half = len(lengths_of_batches) // 2
    assert (
        abs(np.mean(lengths_of_batches[:half]) - np.mean(lengths_of_batches[half:])) < 30
    )  # short batches are spread over the epoch


def test_padding_is_below_ten_percent_for_the_lengths_of_questions() -> None:
    lengths = np.clip(np.random.default_rng(3).lognormal(3.3, 0.45, 5000), 6, 128).astype(np.int64)
    table, plan = table_of(lengths), BatchPlan(lengths, 32)
    for batches in (
        list(training_batches(table, plan, [0], 0, PAD)),
        [batch for _, batch in evaluation_batches(table, 128, PAD)],
    ):
        cells = sum(batch.input_ids.numel() for batch in batches)
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        assert tokens == lengths.sum()
        assert 1 - tokens / cells < 0.1


@quick
@given(LENGTHS, BATCH_SIZES)
def test_buckets_are_whole_batches_of_similar_lengths(lengths: list[int], size: int) -> None:
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
def test_collate_pads_each_row_at_its_end(lengths: list[int], data: st.DataObject, types: bool, spare: int) -> None:
    table = table_of(lengths, types=types, labels=types)
    rows = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=9)))
    length = int(table.lengths[rows].max()) + spare
    batch = collate(table, rows, length, PAD)
    for position, row in enumerate(rows.tolist()):
        start, n = int(table.offsets[row]), lengths[row]
        padding = length - n
        assert batch.input_ids[position].tolist() == table.values[start : start + n].tolist() + [PAD] * padding
        assert batch.attention_mask[position].tolist() == [1] * n + [0] * padding
        if types:
            assert table.types is not None
            assert batch.token_type_ids is not None
            assert batch.token_type_ids[position].tolist() == table.types[start : start + n].tolist() + [0] * padding
    assert (batch.token_type_ids is None) == (not types)
    assert (None if batch.labels is None else batch.labels.tolist()) == ((rows % 2).tolist() if types else None)
    assert batch.full == bool((batch.attention_mask == 1).all())
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64


@quick
@given(LENGTHS, BATCH_SIZES)
def test_evaluation_covers_every_row_once_longest_first(lengths: list[int], size: int) -> None:
    evaluated_rows: list[int] = []
    lengths_of_batches = []
    for rows, batch in evaluation_batches(table_of(lengths, labels=False), size, PAD):
        assert rows_of(batch) == rows.tolist()
        assert batch.input_ids.shape[1] == max(lengths[row] for row in rows)  # no padding of the longest row
        evaluated_rows += rows.tolist()
        lengths_of_batches.append(batch.input_ids.shape[1])
    assert sorted(evaluated_rows) == list(range(len(lengths)))
    assert lengths_of_batches == sorted(lengths_of_batches, reverse=True)


def test_evaluation_without_a_batch_size_has_few_shapes_and_little_padding() -> None:
    lengths = list(range(1, 129)) * 20
    batches = list(evaluation_batches(table_of(lengths), None, PAD))
    assert sorted(row for rows, _ in batches for row in rows.tolist()) == list(range(len(lengths)))
    shapes = Counter(tuple(batch.input_ids.shape) for _, batch in batches)
    assert len(shapes) <= 20  # without the rounding one for each length
    cells = sum(rows * length * count for (rows, length), count in shapes.items())
    assert sum(lengths) <= cells <= 1.15 * sum(lengths)
    assert max(rows * length for rows, length in shapes) <= EVALUATION_TOKENS


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 100])
def test_micro_batches_partition_each_members_rows(members: int, rows: int) -> None:
    seeds = list(range(members))
    lengths = np.random.default_rng(5).integers(2, 12, 8)
    (batch,) = training_batches(table_of(lengths), BatchPlan(lengths, 8), seeds, 0, PAD)
    micro = list(micro_batches(batch, rows))
    assert len(micro) == -(-8 // rows)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        whole = getattr(batch, name).view(members, 8, -1)
        pieces = [
            getattr(micro_batch, name).view(members, len(micro_batch.input_ids) // members, -1) for micro_batch in micro
        ]
        assert all(piece.shape[1] <= rows for piece in pieces)
        assert torch.equal(torch.cat(pieces, 1), whole)
    assert all(micro_batch.members == members for micro_batch in micro)


def test_micro_batches_of_rows_without_types_and_labels() -> None:
    table = replace(table_of([3, 4, 5], types=False), labels=None)
    batch = collate(table, np.arange(3), 5, PAD)
    assert [len(micro_batch.input_ids) for micro_batch in micro_batches(batch, 2)] == [2, 1]
    assert all(
        micro_batch.labels is None and micro_batch.token_type_ids is None for micro_batch in micro_batches(batch, 2)
    )


def test_repeat_gives_each_member_the_same_rows() -> None:
    batch = collate(table_of([3, 5]), np.array([1, 0]), 5, PAD).repeat(3)
    assert batch.members == 3
    assert rows_of(batch) == [1, 0] * 3
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0] * 3
    assert batch.to(torch.device("cpu")) is batch


@given(LENGTHS, BATCH_SIZES)
@quick
def test_padding_counts_the_cells_of_batches_without_a_token(lengths: list[int], batch_size: int) -> None:
    table = table_of(lengths)
    for seeds, copies in (([0], 1), ([3, 3], 2), ([0, 1, 2], 3)):
        batches = list(training_batches(table, BatchPlan(table.lengths, batch_size), seeds, 0, PAD, table))
        padding = [sum(of_batches) for of_batches in zip(*(batch.padding(copies) for batch in batches), strict=True)]
        cells = sum(batch.orders * batch.pairs * batch.input_ids.shape[1] for batch in batches)
        assert padding == [cells - 2 * sum(lengths)] * copies  # every row occurs once in each order


def test_lengths_are_rounded_up_to_the_multiple_but_not_beyond_the_longest_pair() -> None:
    plan = BatchPlan(np.arange(9, 31), 4, multiple=8)
    lengths = {length for _, length in plan.epoch(0, [0])}
    assert lengths <= {16, 24, 30}
    assert [plan.padded_length(n) for n in (9, 16, 17, 25, 30)] == [16, 16, 24, 30, 30]
    assert plan.padded_length(40) == 40  # a perturbed pair
