"""From token tables to batches: which pairs travel together, in which order, padded to which length.

Batch shapes are fixed by the data, the order of pairs by the seed. Pairs are sorted by length into buckets of a few
batches; the sequence of buckets is the same for every seed, and the seed permutes the pairs within each bucket. So
members of a pack that differ in their seeds bring their own pairs in batches of equal shape, and a batch is a pure
function of (seed, epoch, position).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from lora_bench.data.tokenization import TokenTable

    Rows = NDArray[np.int64]

# As wide as about 5 % of padding allows: the narrower a bucket, the more its batches are alike, and where length tells
# something of the content (templates, genres) training suffers. Measured in LOG.md.
LENGTH_RATIO = 1.15
SMALLEST_BUCKET = 2  # batches


@dataclass(frozen=True)
class Batch:
    """N = members · orders · B rows of T tokens for B pairs, member by member and then order by order.

    `members` is 1 where all members share the rows; `orders` is 2 where each pair comes a second time with its texts
    exchanged.
    """

    input_ids: Tensor  # (N, T) int64
    attention_mask: Tensor  # (N, T) int64, 1 for tokens, 0 for padding
    token_type_ids: Tensor | None  # (N, T) int64; None where the tokenizer makes no difference
    labels: Tensor | None  # (N,) int64
    full: bool  # no padding anywhere
    members: int = 1
    orders: int = 1
    hidden: Tensor | None = None  # (N, T, D) what the frozen prefix makes of the rows, where that is kept
    head: int = 0  # which of its members' heads answers the rows, where they have one for each of several tasks

    @property
    def pairs(self) -> int:
        """B, the pairs of each member."""
        return len(self.input_ids) // (self.members * self.orders)

    def select_members(self, members: Sequence[int]) -> Batch:
        """The rows of these members alone, where each has rows of its own."""
        if self.members == 1 or len(members) == self.members:
            return self

        def pick(tensor: Tensor) -> Tensor:
            rows = tensor.view(self.members, -1, *tensor.shape[1:])
            return torch.cat([rows[k] for k in members])

        return replace(self.map(pick), members=len(members))

    def repeat(self, members: int) -> Batch:
        """The same rows once per member."""
        return replace(self.map(lambda t: t.repeat(members, *[1] * (t.ndim - 1))), members=members)

    def to(self, device: torch.device) -> Batch:
        """On the device; from pinned memory, so that the copy overlaps with what the device still computes."""
        if device.type == "cpu":
            return self
        return self.map(lambda t: t.pin_memory().to(device, non_blocking=True))

    def padding(self, members: int) -> list[int]:
        """Tokens that only fill up the rows of each member, where so many see the batch."""
        rows = self.attention_mask.view(self.members, -1)  # one per member, or one for all
        missing: list[int] = (rows.shape[1] - rows.sum(1)).tolist()
        return missing * (members // self.members)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor of it changed in the same way."""
        changed: dict[str, Any] = {name: change(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class BatchPlan:
    """Which rows each training batch holds.

    Args:
        lengths: (N,) tokens of each pair.
        batch_size: pairs per optimizer update.
        multiple: tokens that a batch's length is a multiple of, as far as there are pairs so long.
    """

    lengths: Rows
    batch_size: int
    multiple: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def buckets(self) -> list[Rows]:
        """Row numbers by length, cut at whole batches where the length has grown by LENGTH_RATIO."""
        order = np.argsort(self.lengths, kind="stable")
        lengths, B = self.lengths[order], self.batch_size
        buckets, start = [], 0
        while start < len(order):
            end = start + B * SMALLEST_BUCKET
            while end < len(order) and lengths[min(end + B, len(order)) - 1] <= LENGTH_RATIO * lengths[start]:
                end += B
            buckets.append(order[start:end])
            start = end
        return buckets

    def padded_length(self, length: int) -> int:
        """The length of a batch whose longest pair has `length` tokens."""
        return max(length, min(-(-length // self.multiple) * self.multiple, int(self.lengths.max())))

    def epoch(self, epoch: int, seeds: Sequence[int]) -> Iterator[tuple[list[Rows], int]]:
        """The batches of one epoch in order: for each distinct seed its rows, and the length T to pad to."""
        buckets = self.buckets()
        tops = [self.padded_length(int(self.lengths[bucket].max())) for bucket in buckets]
        shuffled = [
            [np.random.default_rng((seed, epoch, i)).permutation(bucket) for i, bucket in enumerate(buckets)]
            for seed in seeds
        ]
        slots = [(i, start) for i, bucket in enumerate(buckets) for start in range(0, len(bucket), self.batch_size)]
        for slot in np.random.default_rng(epoch).permutation(len(slots)):  # the same for every seed
            i, start = slots[slot]
            yield [own[i][start : start + self.batch_size] for own in shuffled], tops[i]


def training_batches(
    table: TokenTable,
    plan: BatchPlan,
    seeds: Sequence[int],
    epoch: int,
    pad_id: int,
    second_view: TokenTable | None = None,
) -> Iterator[Batch]:
    """The batches of one epoch for members of these seeds; rows are shared where all seeds are equal.

    With `second_view`, the same pairs with their texts exchanged, each batch holds its pairs in both orders. With
    `table.reversed_view` it holds them in one: half of the pairs in each epoch as they are, in the next the other half.
    Where pairs are perturbed, a batch is as long as its longest pair has become.
    """
    views = [each.in_epoch(epoch) for each in (table, table.reversed_view, second_view) if each is not None]
    distinct = list(dict.fromkeys(seeds))
    for rows, length in plan.epoch(epoch, distinct):
        members = 1 if len(distinct) == 1 else len(seeds)
        own = np.concatenate([rows[distinct.index(seed)] for seed in seeds[:members]])
        longest = max(length, *(plan.padded_length(int(view.lengths[own].max())) for view in views))
        if table.reversed_view is not None:
            turned = (own + epoch) % 2 == 1  # what was (N,) in one order is so many rows in each
            one, other = (
                collate(view, own[turned == turn], longest, pad_id, members) for turn, view in enumerate(views)
            )
            yield _joined(one, other, torch.from_numpy(np.argsort(np.argsort(turned, kind="stable"))))
            continue
        batch, *swaps = [collate(view, own, longest, pad_id, members) for view in views]
        yield join_orders(batch, *swaps) if swaps else batch


def join_orders(batch: Batch, second_view: Batch) -> Batch:
    """Each member's rows, and behind them the same pairs with their texts exchanged."""
    # (2, members, B) row numbers, read member by member
    places = torch.arange(2 * len(batch.input_ids)).view(2, batch.members, -1).transpose(0, 1).flatten()
    return replace(_joined(batch, second_view, places), orders=2)


def _joined(one: Batch, other: Batch, places: Tensor) -> Batch:
    """The rows of both, the other's behind, taken in the order of `places`."""
    both: dict[str, Any] = {
        name: torch.cat([value, getattr(other, name)])[places]
        for name, value in vars(one).items()
        if isinstance(value, Tensor)
    }
    return replace(one, **both, full=one.full and other.full)


def evaluation_batches(table: TokenTable, batch_size: int, pad_id: int) -> Iterator[tuple[Rows, Batch]]:
    """Every row once, longest first, with the row numbers of each batch."""
    for rows in evaluation_rows(table, batch_size):
        yield rows, collate(table, rows, int(table.lengths[rows].max()), pad_id)


def evaluation_rows(table: TokenTable, batch_size: int) -> list[Rows]:
    """The row numbers of each batch of an evaluation; none is longer than its first row."""
    order = np.argsort(-table.lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def micro_batches(batch: Batch, pairs: int) -> Iterator[Batch]:
    """The batch in portions of at most `pairs` pairs per member, each in all its orders."""
    B = batch.pairs
    if pairs >= B:
        yield batch
        return
    for i in range(0, B, pairs):
        yield slice_pairs(batch, i, min(i + pairs, B))


def slice_pairs(batch: Batch, start: int, end: int) -> Batch:
    """Pairs `start` to `end` of each member, in all their orders."""
    blocks = range(0, len(batch.input_ids), batch.pairs)  # one per member and order
    rows = torch.cat([torch.arange(block + start, block + end) for block in blocks])
    return batch.map(lambda t: t[rows])


def collate(table: TokenTable, rows: Rows, length: int, pad_id: int, members: int = 1) -> Batch:
    """Rows of the table as one padded batch, without a Python loop over rows."""
    places, kept = token_positions(table, rows, length)  # (N, T) each
    ids = np.where(kept, table.values[places], pad_id).astype(np.int64)
    types = None if table.types is None else np.where(kept, table.types[places], 0).astype(np.int64)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(kept.astype(np.int64)),
        None if types is None else torch.from_numpy(types),
        None if table.labels is None else torch.from_numpy(table.labels[rows]),
        bool(kept.all()),
        members,
        hidden=None if table.hidden is None else table.hidden.read(places, kept),
        head=table.head,
    )


def token_positions(table: TokenTable, rows: Rows, length: int) -> tuple[Rows, NDArray[np.bool_]]:
    """Where the table keeps each token of a padded batch (N, T), and whether there is one (N, T)."""
    columns = np.arange(length)
    kept = columns < table.lengths[rows][:, None]
    return np.minimum(table.offsets[rows][:, None] + columns, len(table.values) - 1), kept
