"""Token tables: the tokenised texts of a split in flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lora_bench.data.encoding import IDS, TEXTS, TYPES, Encoding, read_counts
from lora_bench.errors import Code, UserError
from lora_bench.files.arrow import to_numpy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from lora_bench.config.schema import Data
    from lora_bench.data.augmentation import Augmentation
    from lora_bench.data.examples import Examples
    from lora_bench.data.hidden_states import HiddenStates
    from lora_bench.data.special_tokens import SpecialTokens
    from lora_bench.data.text_positions import TextPositions


class PairReader(Protocol):
    """The text side of a backbone: its template and its tokenizer."""

    tokenizer: Any

    @property
    def special_tokens(self) -> SpecialTokens:
        """The tokenizer's reading of special tokens that the texts contain."""
        ...

    def render(self, columns: Sequence[tuple[str, list[str]]]) -> tuple[list[str], list[str] | None]:
        """Return the first and the second text of every pair as the model reads them."""
        ...

    def text_positions(self, columns: Sequence[tuple[str, list[str]]]) -> TextPositions | None:
        """Return how the tokens of every pair are assigned to its texts; None if nothing depends on that."""
        ...


_OTHER_TEXT = {"first": "second", "second": "first"}


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one split: row i holds values[offsets[i] : offsets[i] + lengths[i]]."""

    values: NDArray[np.int32]  # (sum of lengths,)
    offsets: NDArray[np.int64]  # (N,)
    lengths: NDArray[np.int64]  # (N,)
    types: NDArray[np.int8] | None  # (sum of lengths,) 0 for the first text, 1 for the second; None: no difference
    labels: NDArray[Any] | None  # (N,) class numbers, or numbers
    ids: NDArray[np.int64]  # (N,) row in the source
    truncated: int  # rows that were longer than the limit
    longest: int = 0  # tokens of the longest row before truncation
    fallback: int = 0  # truncated rows whose other text alone fills the limit, so that both texts lost tokens
    hidden: HiddenStates | None = None  # output of the frozen prefix for the tokens, if it is cached
    augmentation: Augmentation | None = None  # perturbation of its pairs in each epoch, if any
    head: int = 0  # index of the member's head that classifies it
    reversed_view: TokenTable | None = None  # the same rows with their texts in reversed order
    text_ids: NDArray[np.int8] | None = None  # (sum of lengths,) 1: first text, 2: second, 0: neither; None: not needed

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: NDArray[np.int64]) -> TokenTable:
        """Return the table with the rows at these positions only, in this order, without augmentation.

        Its `reversed_view` has the same rows; `truncated` still counts those of the whole table.
        """
        return replace(
            self,
            offsets=self.offsets[rows],
            lengths=self.lengths[rows],
            labels=None if self.labels is None else self.labels[rows],
            ids=self.ids[rows],
            augmentation=None,
            reversed_view=None if self.reversed_view is None else self.reversed_view.take(rows),
        )

    def in_epoch(self, epoch: int) -> TokenTable:
        """Return the table for one epoch: the table itself, or a perturbed copy if it has an augmentation."""
        return self if self.augmentation is None else self.augmentation.table(self, epoch)


def tokenize(
    examples: Examples,
    columns: Sequence[str],
    backbone: PairReader,
    max_length: int,
    *,
    truncation: str = "longest_first",
    reverse: bool = False,
    cached: bool = True,
    head: int = 0,
) -> TokenTable:
    """Tokenise the examples of one split.

    Padding and truncation of the tokenizer are turned off for it and stay off.

    Args:
        examples: the split's texts and labels.
        columns: names of its text columns; T5's template shows them.
        backbone: gives the template and the tokenizer.
        max_length: tokens per example.
        truncation: where a longer example loses tokens, a value of `data.truncation`. `first` and `second` are the
            texts as the columns have them, also with `reverse`. If the other text alone fills `max_length`, they act as
            `longest_first`.
        reverse: tokenise the texts in reversed order; the names of the columns keep their order.
        cached: read the tokens from the cache if it has them, else write them to it.
        head: index of the member's head that classifies the rows.

    Raises:
        UserError: the tokenizer fails on a text, the cache's environment variables are invalid, or `truncation` names
            one of two texts and the backbone reads both as one text.
    """
    texts = examples.texts[::-1] if reverse else examples.texts
    named_texts = list(zip(columns, map(backbone.special_tokens.break_in, texts), strict=True))
    first, second = backbone.render(named_texts)
    positions = backbone.text_positions(named_texts)
    are_separable = second is not None or (positions is not None and positions.keeps_template)
    if truncation in _OTHER_TEXT and len(columns) > 1 and not are_separable:
        raise UserError(
            "names one of two texts, and this model reads both as one text",
            key="data.truncation",
            value=truncation,
            remedy="Set data.truncation to longest_first, which truncates that text at its end, or to middle.",
            code=Code.UNSUPPORTED,
        )
    if reverse:
        truncation = _OTHER_TEXT.get(truncation, truncation)
    encoding = Encoding(first, second, backbone.tokenizer, backbone.special_tokens, max_length, truncation, positions)
    batch = encoding.tokens(cached=cached)
    truncated, longest, fallback = read_counts(batch)
    tokens = batch.column(IDS.name)
    offsets = to_numpy(tokens.offsets).astype(np.int64)
    types, text_ids = (
        to_numpy(batch.column(field.name).values) if field.name in batch.schema.names else None
        for field in (TYPES, TEXTS)
    )
    return TokenTable(
        values=to_numpy(tokens.values),
        offsets=offsets[:-1],
        lengths=np.diff(offsets),
        types=types,
        labels=examples.labels,
        ids=examples.ids,
        truncated=truncated,
        longest=longest,
        fallback=fallback,
        head=head,
        text_ids=text_ids,
    )


def scoring_table(
    examples: Examples, data: Data, backbone: PairReader, *, both_orders: bool, cached: bool = True, head: int = 0
) -> TokenTable:
    """Tokenise a split for scoring, never augmented; with `both_orders`, the table has a `reversed_view`.

    Args:
        examples: the split's texts and labels.
        data: settings of the task.
        backbone, cached, head: as for `tokenize`.
        both_orders: tokenise the texts in reversed order too.
    """
    table, *reversed_tables = [
        tokenize(
            examples,
            data.text_columns,
            backbone,
            data.max_length,
            truncation=data.truncation,
            reverse=reverse,
            cached=cached,
            head=head,
        )
        for reverse in ((False, True) if both_orders else (False,))
    ]
    return replace(table, reversed_view=reversed_tables[0]) if reversed_tables else table


def truncation_notes(tables: Mapping[str, TokenTable], data: Data) -> list[str]:
    """Return sentences on the examples of a task that lose tokens; none if no example does.

    Args:
        tables: by split.
        data: settings of the task.
    """
    notes = []
    limit = f"data.max_length={data.max_length}"
    if shares := [_truncated_share(split, table) for split, table in tables.items() if table.truncated]:
        longest = max(table.longest for table in tables.values())
        notes.append(f"{', '.join(shares)} are longer than {limit} and lose tokens; the longest has {longest:,}.")
    if fallback := sum(table.fallback for table in tables.values()):
        notes.append(
            f"{fallback:,} of these examples are truncated as with data.truncation=longest_first, because their "
            f"{_OTHER_TEXT[data.truncation]} text alone fills {limit}."
        )
    return notes


def _truncated_share(split: str, table: TokenTable) -> str:
    """Return the share of a split's examples that lose tokens, in words; their number below one per cent."""
    percent = 100 * table.truncated / len(table)
    share = f"{percent:.0f} %" if percent >= 1 else f"{table.truncated:,}"
    return f"{share} of {len(table):,} examples of {split}"
