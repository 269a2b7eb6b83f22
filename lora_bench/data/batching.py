"""Batches from token tables: the pairs of each batch, their order, and the length to pad to.

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

# As wide as about 5 % of padding allows. In a narrower bucket, batches resemble each other, and training suffers if
# length depends on content (templates, genres). Measured in LOG.md.
LENGTH_RATIO = 1.15
SMALLEST_BUCKET = 2  # batches
EVALUATION_TOKENS = 8192
"""Tokens of an evaluation batch, padding included, if no batch size is set."""


@dataclass(frozen=True)
class Batch:
    """N = members · orders · B rows of T tokens for B pairs, member by member and then order by order.

    `members` is 1 if all members share the rows. `orders` is 2 if each pair comes a second time, as its second view.
    """

    input_ids: Tensor  # (N, T) int64
    attention_mask: Tensor  # (N, T) int64, 1 for tokens, 0 for padding
    token_type_ids: Tensor | None  # (N, T) int64; None if the tokenizer has no token types
    labels: Tensor | None  # (N,) int64 class numbers, or float32 numbers
    full: bool  # no padding anywhere
    members: int = 1
    orders: int = 1
    hidden: Tensor | None = None  # (N, T, D) output of the frozen prefix, if it is cached
    head: int = 0  # index of the members' head that classifies the rows, if they have one per task
    text_ids: Tensor | None = None  # (N, T) int8, 1: first text, 2: second, 0: neither; None: not needed

    @property
    def pairs(self) -> int:
        """Return B, the number of pairs of each member."""
        return len(self.input_ids) // (self.members * self.orders)

    def select_members(self, members: Sequence[int]) -> Batch:
        """Return the batch with the rows of these members only, in this order.

        It is the batch itself if all members share the rows, or if these are all of them in their own order.

        Args:
            members: positions in the batch, from 0.
        """
        if self.members == 1 or list(members) == list(range(self.members)):
            return self

        def pick(tensor: Tensor) -> Tensor:
            rows = tensor.view(self.members, -1, *tensor.shape[1:])
            return torch.cat([rows[k] for k in members])

        return replace(self.map(pick), members=len(members))

    def repeat(self, members: int) -> Batch:
        """Return the batch with its rows repeated once per member; all members share its rows so far."""
        return replace(self.map(lambda t: t.repeat(members, *[1] * (t.ndim - 1))), members=members)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device, from pinned memory, so that the copy overlaps with computation there.

        For the CPU it is the batch itself.
        """
        if device.type == "cpu":
            return self
        return self.map(lambda t: t.pin_memory().to(device, non_blocking=True))

    def padding(self, members: int) -> list[int]:
        """Return the number of padding tokens in the rows of each of `members` members, a multiple of the batch's own.

        If all members share the rows, each has the padding of all of them.
        """
        rows = self.attention_mask.view(self.members, -1)  # one per member, or one for all
        missing: list[int] = (rows.shape[1] - rows.sum(1)).tolist()
        return missing * (members // self.members)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with a function applied to each of its tensors."""
        changed: dict[str, Any] = {name: change(t) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class BatchPlan:
    """The assignment of rows to training batches.

    Args:
        lengths: (N,) tokens of each pair.
        batch_size: pairs per optimizer update.
        multiple: batch lengths are rounded up to a multiple of this, but not beyond the longest pair.
    """

    lengths: Rows
    batch_size: int
    multiple: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch, the last of which may be smaller."""
        return -(-len(self.lengths) // self.batch_size)

    def buckets(self) -> list[Rows]:
        """Return row numbers sorted by length, split at batch boundaries where the length has grown by LENGTH_RATIO.

        Each bucket has at least SMALLEST_BUCKET whole batches; the last may have fewer, and its last batch fewer rows.
        """
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
        """Return the length to which a batch is padded whose longest pair has `length` tokens."""
        return max(length, min(-(-length // self.multiple) * self.multiple, int(self.lengths.max())))

    def epoch(self, epoch: int, seeds: Sequence[int]) -> Iterator[tuple[list[Rows], int]]:
        """Yield the batches of one epoch, each as (rows, padded length T).

        `rows` has one array for each of the distinct seeds. All seeds have the same lengths in the same order, and
        other rows. T is that of the longest pair of the batch's bucket.
        """
        buckets = self.buckets()
        lengths = [self.padded_length(int(self.lengths[bucket].max())) for bucket in buckets]
        shuffled = [
            [np.random.default_rng((seed, epoch, i)).permutation(bucket) for i, bucket in enumerate(buckets)]
            for seed in seeds
        ]
        slots = [(i, start) for i, bucket in enumerate(buckets) for start in range(0, len(bucket), self.batch_size)]
        for slot in np.random.default_rng(epoch).permutation(len(slots)):  # the same for every seed
            i, start = slots[slot]
            yield [rows[i][start : start + self.batch_size] for rows in shuffled], lengths[i]


def training_batches(
    table: TokenTable,
    plan: BatchPlan,
    seeds: Sequence[int],
    epoch: int,
    pad_id: int,
    second_view: TokenTable | None = None,
) -> Iterator[Batch]:
    """Yield the batches of one epoch for members with these seeds; members share the rows if all seeds are equal.

    With `second_view`, each batch holds its pairs twice: in their first and in their second view (`orders` is 2). With
    `table.reversed_view`, half of the pairs are in reversed order in each epoch, the other half in the next; `orders`
    stays 1. The two exclude each other. If pairs are perturbed, a batch is as long as its longest perturbed pair.

    Args:
        table: the training pairs.
        plan: of the table's rows.
        seeds: one per member, in the order of the members.
        epoch: fixes the order of the batches, and with a seed the rows of each.
        pad_id: token id of padding.
        second_view: the same pairs, tokenised in another way.
    """
    views = [view.in_epoch(epoch) for view in (table, table.reversed_view, second_view) if view is not None]
    distinct = list(dict.fromkeys(seeds))
    for rows, length in plan.epoch(epoch, distinct):
        members = 1 if len(distinct) == 1 else len(seeds)
        batch_rows = np.concatenate([rows[distinct.index(seed)] for seed in seeds[:members]])
        longest = max(length, *(plan.padded_length(int(view.lengths[batch_rows].max())) for view in views))
        if table.reversed_view is not None:
            is_reversed = (batch_rows + epoch) % 2 == 1  # (N,)
            in_order, in_reverse = (
                collate(view, batch_rows[is_reversed == flag], longest, pad_id, members)
                for flag, view in enumerate(views)
            )
            order = torch.from_numpy(np.argsort(np.argsort(is_reversed, kind="stable")))
            yield _concatenate(in_order, in_reverse, order)
            continue
        batch, *second_batches = [collate(view, batch_rows, longest, pad_id, members) for view in views]
        yield join_orders(batch, *second_batches) if second_batches else batch


def join_orders(batch: Batch, second_view: Batch) -> Batch:
    """Return one batch with each member's rows, followed by the second view of the same pairs.

    Both batches are padded to the same length.
    """
    # (2, members, B) row numbers, read member by member
    order = torch.arange(2 * len(batch.input_ids)).view(2, batch.members, -1).transpose(0, 1).flatten()
    return replace(_concatenate(batch, second_view, order), orders=2)


def _concatenate(first: Batch, second: Batch, order: Tensor) -> Batch:
    """Return the rows of the first batch followed by those of the second, reordered.

    Args:
        first: a batch; its `members`, `orders` and `head` are those of the result.
        second: a batch padded to the same length T, with the same tensors.
        order: row numbers of the concatenation; row i of the result is row `order[i]`.
    """
    both: dict[str, Any] = {
        name: torch.cat([value, getattr(second, name)])[order]
        for name, value in vars(first).items()
        if isinstance(value, Tensor)
    }
    return replace(first, **both, full=first.full and second.full)


def evaluation_batches(table: TokenTable, batch_size: int | None, pad_id: int) -> Iterator[tuple[Rows, Batch]]:
    """Yield every row once, longest first, as (row numbers, batch)."""
    for rows, length in evaluation_plan(table, batch_size):
        yield rows, collate(table, rows, length, pad_id)


def evaluation_plan(table: TokenTable, batch_size: int | None) -> list[tuple[Rows, int]]:
    """Return the row numbers of each evaluation batch, longest first, and the length to pad it to.

    Args:
        table: whose rows are batched.
        batch_size: rows of a batch, padded to the longest of them; None: an even number with at most
            `EVALUATION_TOKENS`, padded to a length of `few_lengths`. Then two passes with half of the rows each have
            one shape, and there are few shapes in all.
    """
    order = np.argsort(-table.lengths, kind="stable")
    most = int(table.lengths.max(initial=1))
    batches, start = [], 0
    while start < len(order):
        longest = int(table.lengths[order[start]])
        length = longest if batch_size else min(few_lengths(longest), most)
        rows = batch_size or max(1, EVALUATION_TOKENS // length // 2 * 2)
        batches.append((order[start : start + rows], length))
        start += rows
    return batches


def few_lengths(length: int) -> int:
    """Return the length, rounded up to a multiple of 2 above 8, of 4 above 16, of 8 above 32, and so on.

    So there are four lengths between a power of two and the next one. On a CPU with AMX the first product of a shape
    takes three to seven times as long as later ones, and keeps megabytes; the padding costs less (LOG.md).
    """
    multiple = max(1, (1 << (length - 1).bit_length()) // 8)
    return -(-length // multiple) * multiple


def micro_batches(batch: Batch, pairs: int) -> Iterator[Batch]:
    """Yield the batch in micro-batches of at most `pairs` pairs per member, each pair in all its orders.

    The last may be smaller. A batch that is no larger than `pairs` is yielded itself.
    """
    B = batch.pairs
    if pairs >= B:
        yield batch
        return
    for i in range(0, B, pairs):
        yield slice_pairs(batch, i, min(i + pairs, B))


def slice_pairs(batch: Batch, start: int, end: int) -> Batch:
    """Return the pairs from `start` to `end` (exclusive) of each member, in all their orders."""
    blocks = range(0, len(batch.input_ids), batch.pairs)  # one per member and order
    rows = torch.cat([torch.arange(block + start, block + end) for block in blocks])
    return batch.map(lambda t: t[rows])


def collate(table: TokenTable, rows: Rows, length: int, pad_id: int, members: int = 1) -> Batch:
    """Return rows of the table as one batch padded to `length`, without a Python loop over rows.

    Args:
        table: the tokens.
        rows: (members · B,) row numbers, member by member.
        length: T, at least that of the longest row.
        pad_id: token id of padding.
        members: recorded in the batch; 1 if all members share the rows.

    Returns:
        a batch on the CPU with `orders` 1. Its hidden states are read from their file if the table has them.

    Raises:
        RunFailedError: the file of the hidden states can no longer be read.
    """
    positions, is_token = token_positions(table, rows, length)  # (N, T) each
    ids = np.where(is_token, table.values[positions], pad_id).astype(np.int64)
    types = None if table.types is None else np.where(is_token, table.types[positions], 0).astype(np.int64)
    texts = None if table.text_ids is None else np.where(is_token, table.text_ids[positions], 0).astype(np.int8)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(is_token.astype(np.int64)),
        None if types is None else torch.from_numpy(types),
        None if table.labels is None else _label_tensor(table.labels[rows]),
        bool(is_token.all()),
        members,
        hidden=None if table.hidden is None else table.hidden.read(positions, is_token),
        head=table.head,
        text_ids=None if texts is None else torch.from_numpy(texts),
    )


def _label_tensor(labels: NDArray[Any]) -> Tensor:
    """Return labels as a tensor: class numbers as int64, numbers as float32."""
    tensor = torch.from_numpy(labels)
    return tensor.float() if tensor.is_floating_point() else tensor


def token_positions(table: TokenTable, rows: Rows, length: int) -> tuple[Rows, NDArray[np.bool_]]:
    """Return the table's index of each token in a padded batch (N, T), and a mask (N, T) that is False for padding.

    The index of padding is that of some other token.
    """
    columns = np.arange(length)
    is_token = columns < table.lengths[rows][:, None]
    return np.minimum(table.offsets[rows][:, None] + columns, len(table.values) - 1), is_token
