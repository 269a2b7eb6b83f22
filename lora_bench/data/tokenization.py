"""Token tables: tokenised texts in flat arrays, cached as Arrow streams under a hash of their content.

The hash covers the texts, the tokenizer, the length limit, the truncation and the positions of the texts, so a stale
file is never read. A cached table is read into memory and checked there: its ids and types must be ones that the
tokenizer can produce.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import tokenizers

from lora_bench.console.stages import stage
from lora_bench.data.text_positions import TextPositions
from lora_bench.data.truncation import kept_positions
from lora_bench.errors import Code, UserError
from lora_bench.files.cache import CacheFiles, token_limit_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    from lora_bench.config.schema import Data
    from lora_bench.data.augmentation import Augmentation
    from lora_bench.data.examples import Examples
    from lora_bench.data.hidden_states import HiddenStates

CHUNK = 512  # pairs handed to the tokenizer at a time: larger chunks leave the processor's cache


class PairReader(Protocol):
    """The text side of a backbone: its template and its tokenizer."""

    tokenizer: Any

    def render(self, columns: Sequence[tuple[str, list[str]]]) -> tuple[list[str], list[str] | None]:
        """Return the first and the second text of every pair as the model reads them."""
        ...

    def text_positions(self, columns: Sequence[tuple[str, list[str]]]) -> TextPositions | None:
        """Return how the tokens of every pair are assigned to its texts; None if nothing depends on that."""
        ...


_IDS = pa.field("input_ids", pa.list_(pa.int32()))
_TYPES = pa.field("token_type_ids", pa.list_(pa.int8()))
_TEXTS = pa.field("text_ids", pa.list_(pa.int8()))
_COUNTS = ("truncated", "longest", "fallback")  # of a table, in the metadata of its batch
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
    named_texts = list(zip(columns, texts, strict=True))
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
    encode = _load_or_encode if cached else _encode
    batch = encode(first, second, backbone.tokenizer, max_length, truncation, positions)
    truncated, longest, fallback = _read_counts(batch)
    tokens = batch.column("input_ids")
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    types, text_ids = (
        batch.column(field.name).values.to_numpy() if field.name in batch.schema.names else None
        for field in (_TYPES, _TEXTS)
    )
    return TokenTable(
        values=tokens.values.to_numpy(),
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


def _encode(
    first: list[str],
    second: list[str] | None,
    tokenizer: Any,
    max_length: int,
    truncation: str,
    positions: TextPositions | None = None,
) -> pa.RecordBatch:
    """Return the tokens of the texts, encoded in chunks: `input_ids`, and `token_type_ids` if any of them is not 0.

    With `positions` there are `text_ids` too. The metadata of the batch has the counts of `TokenTable`: `truncated`,
    `longest` and `fallback`. An empty text of which a tokenizer without special tokens makes no token is one padding
    token, which the network reads. The tokenizer is left without padding and truncation.

    Raises:
        UserError: as `_encode_chunk` and `_truncate`.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    pairs = first if second is None else list(zip(first, second, strict=True))
    for_truncation = positions if positions is not None and positions.keeps_template else TextPositions()
    ids: list[NDArray[np.int32]] = []
    types: list[NDArray[np.int8]] = []
    text_ids: list[NDArray[np.int8]] = []
    lengths: list[NDArray[np.int64]] = []
    counts = dict.fromkeys(_COUNTS, 0)
    first_row = 0
    with_offsets = positions is not None and positions.spans is not None
    for encodings in _encode_in_chunks(backend, pairs, with_offsets=with_offsets):
        sizes = np.fromiter(map(len, encodings), np.int64, len(encodings))
        for row in np.flatnonzero(sizes == 0).tolist():
            encodings[row].pad(1, pad_id=tokenizer.pad_token_id)
        kept: dict[int, Sequence[int]] = {}  # positions in the rows that are longer than the limit
        for row in np.flatnonzero(sizes > max_length).tolist():
            of_tokens = for_truncation.text_ids(encodings[row], first_row + row)
            kept[row], is_fallback = _truncate(of_tokens, max_length, truncation)
            counts["fallback"] += is_fallback
        counts["truncated"] += len(kept)
        counts["longest"] = max(counts["longest"], 1, int(sizes.max()))
        lengths.append(np.clip(sizes, 1, max_length))
        total = int(lengths[-1].sum())
        ids.append(np.fromiter(_flat((e.ids for e in encodings), kept), np.int32, total))
        types.append(np.fromiter(_flat((e.type_ids for e in encodings), kept), np.int8, total))
        if positions is not None:
            of_rows = [positions.text_ids(e, first_row + row) for row, e in enumerate(encodings)]
            text_ids += [of_row[kept[row]] if row in kept else of_row for row, of_row in enumerate(of_rows)]
        first_row += len(encodings)
    offsets = pa.array(np.concatenate([[0], *lengths]).cumsum(), pa.int32())
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(ids)))}
    flat_types = np.concatenate(types)
    if flat_types.any():
        columns["token_type_ids"] = pa.ListArray.from_arrays(offsets, pa.array(flat_types))
    if positions is not None:
        columns["text_ids"] = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(text_ids)))
    batch = pa.RecordBatch.from_pydict(columns)
    return batch.replace_schema_metadata({name: str(count) for name, count in counts.items()})


def _encode_in_chunks(backend: Any, pairs: Sequence[Any], *, with_offsets: bool) -> Iterator[list[Any]]:
    """Yield the encodings of `CHUNK` pairs (or single texts) at a time, and show the progress of a long table.

    The tokenizer's native code uses all cores. It encodes the next chunk while the caller works on the last one, which
    takes an eighth of the processor time and would leave the other cores idle.

    Raises:
        UserError: as `_encode_chunk`.
    """
    encode = partial(_encode_chunk, with_offsets=with_offsets)
    chunks = (pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK))
    with stage("tokenising", total=len(pairs), unit="pairs") as progress, ThreadPoolExecutor(1) as thread:
        pending = [thread.submit(encode, backend, chunk) for chunk in islice(chunks, 1)]
        while pending:
            encodings = pending.pop().result()
            pending = [thread.submit(encode, backend, chunk) for chunk in islice(chunks, 1)]
            yield encodings
            progress.advance(len(encodings))


def _flat(rows: Iterable[Sequence[int]], kept: Mapping[int, Sequence[int]]) -> Iterator[int]:
    """Return the values of all rows one after the other.

    Args:
        rows: values of each row.
        kept: positions of the values to return, by the number of a row that does not keep all.
    """
    if not kept:
        return chain.from_iterable(rows)
    return chain.from_iterable(
        values if row not in kept else [values[position] for position in kept[row]] for row, values in enumerate(rows)
    )


def _truncate(text_ids: NDArray[np.int8], max_length: int, truncation: str) -> tuple[list[int], bool]:
    """Return the result of `kept_positions`.

    Raises:
        UserError: the tokens outside of the texts leave no room for a text.
    """
    try:
        return kept_positions(text_ids, max_length, truncation)
    except ValueError as error:
        remedy = "Give more tokens, or a shorter model.template."
        raise UserError(
            str(error), key="data.max_length", value=max_length, remedy=remedy, code=Code.CONFLICT
        ) from None


def _encode_chunk(backend: Any, pairs: Sequence[Any], *, with_offsets: bool) -> list[Any]:
    """Return the encodings of the pairs (or single texts), computed on all cores, with character offsets if requested.

    Raises:
        UserError: the tokenizer's native code fails or panics, for example where a pattern of it backtracks for ever.
    """
    try:
        return list(backend.encode_batch(pairs) if with_offsets else backend.encode_batch_fast(pairs))
    except BaseException as error:  # a panic is no Exception
        if type(error).__name__ != "PanicException" and type(error) is not Exception:
            raise
        reason = f"the tokenizer fails on a text of the data ({str(error).strip().splitlines()[0][:200]})"
        remedy = (
            "Take another tokenizer with model.tokenizer=DIR, or shorten very long words and runs of one character."
        )
        raise UserError(reason, key="model.tokenizer", remedy=remedy, code=Code.UNSUPPORTED) from None


def _load_or_encode(
    first: list[str],
    second: list[str] | None,
    tokenizer: Any,
    max_length: int,
    truncation: str,
    positions: TextPositions | None,
) -> pa.RecordBatch:
    """Return the tokens from the cache, or encode the texts and write them to it.

    The cache is not used if its limit is 0, and tokens larger than the limit are not written. If a cache file is
    invalid or cannot be written, a note is printed.

    Raises:
        UserError: as `_encode`; or the cache's environment variables are invalid.
    """
    files = CacheFiles("tokens", token_limit_bytes())
    if not files.limit_bytes:
        return _encode(first, second, tokenizer, max_length, truncation, positions)
    key = _key(first, second, tokenizer, max_length, truncation, positions)
    has_texts = positions is not None
    parse = partial(
        _parse,
        rows=len(first),
        paired=second is not None,
        tokenizer=tokenizer,
        max_length=max_length,
        has_texts=has_texts,
    )
    max_bytes = len(first) * (max_length * 6 + 12) + (1 << 20)  # an id, a type, a text; three offsets; the schema
    batch = files.read(key, parse, max_bytes=max_bytes)
    if batch is None:
        batch = _encode(first, second, tokenizer, max_length, truncation, positions)
        if batch.nbytes <= files.limit_bytes:
            written = files.write(key, partial(_write, batch), size_bytes=batch.nbytes)
            if written:
                written.close()
    return batch


def _write(batch: pa.RecordBatch, file: BinaryIO) -> None:
    """Write a batch as an Arrow stream, which `_parse` reads."""
    with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)


def _parse(
    payload: bytes, *, rows: int, paired: bool, tokenizer: Any, max_length: int, has_texts: bool
) -> pa.RecordBatch:
    """Read a cached batch, and check that the tokenizer could have given it: rows, lengths, ids, types and texts.

    Raises:
        ValueError: it could not, or is no Arrow stream.
    """
    try:
        batch = pa.ipc.open_stream(payload).read_next_batch()
        batch.validate(full=True)
        truncated, longest, fallback = _read_counts(batch)
    except (pa.ArrowException, OSError, StopIteration, KeyError, ValueError) as error:
        raise ValueError(f"holds no tokens: {error}") from None
    if batch.num_rows != rows or not 0 <= fallback <= truncated <= rows:
        raise ValueError(f"does not hold the tokens of {rows} rows")
    has_types = _TYPES.name in batch.schema.names
    fields = [_IDS, *([_TYPES] if has_types else []), *([_TEXTS] if has_texts else [])]
    if batch.schema.remove_metadata() != pa.schema(fields) or any(c.null_count for c in batch.columns):
        raise ValueError("holds other columns than tokens have")
    ids, *_ = [column.values for column in batch.columns]
    offsets, *other_offsets = [column.offsets.to_numpy() for column in batch.columns]
    flat = ids.null_count == 0 and offsets[0] == 0 and offsets[-1] == len(ids)
    lengths = np.diff(offsets)
    widest = int(lengths.max(initial=0))
    fits = widest == longest <= max_length if not truncated else widest == max_length < longest
    if not flat or not fits or not lengths.all() or any((o != offsets).any() for o in other_offsets):
        raise ValueError("holds rows of other lengths than tokens have")
    backend = tokenizer.backend_tokenizer
    if _outside(ids, _highest_id(backend, ids)):
        raise ValueError("holds ids that the tokenizer does not have")
    empty, short = [backend.encode(*[text] * (2 if paired else 1)).type_ids for text in ("", "a")]
    is_wrong = _outside(batch.column(_TYPES.name).values, max(1, *short)) if has_types else any(empty)
    if is_wrong:
        raise ValueError("holds other token types than the tokenizer gives")
    if has_texts and _outside(batch.column(_TEXTS.name).values, 2):
        raise ValueError("holds tokens of other texts than the first and the second")
    return batch


def _read_counts(batch: pa.RecordBatch) -> tuple[int, ...]:
    """Return the counts in a batch's metadata, in the order of `_COUNTS`.

    Raises:
        KeyError: one is missing.
        ValueError: one is no whole number.
    """
    return tuple(int((batch.schema.metadata or {})[name.encode()]) for name in _COUNTS)


def _outside(values: pa.Array, highest: int) -> bool:
    """Return whether a value is missing, negative or above the highest; False if there are no values."""
    numbers = values.to_numpy() if values.null_count == 0 else np.array([-1])
    return bool(len(numbers)) and not 0 <= numbers.min() <= numbers.max() <= highest


def _highest_id(backend: Any, ids: pa.Array) -> int:
    """Return the highest id that these may have: the size of the vocabulary less 1 if none is above it.

    Otherwise it is the highest id of the vocabulary, which may have gaps.
    """
    size = backend.get_vocab_size()
    return size - 1 if not _outside(ids, size - 1) else max(backend.get_vocab().values(), default=-1)


def _key(
    first: list[str],
    second: list[str] | None,
    tokenizer: Any,
    max_length: int,
    truncation: str,
    positions: TextPositions | None,
) -> str:
    """Return the cache key of these tokens: 40 hexadecimal digits, a hash of all that they depend on.

    Padding and truncation of the tokenizer are turned off for it and stay off.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()  # its state is part of the text below
    version = f"{tokenizers.__version__}|{backend.encode_special_tokens}"
    digest = sha256(f"{backend.to_str()}|{max_length}|{truncation}|{second is not None}|{version}".encode())
    if positions is not None:
        digest.update(positions.key)
    for texts in (first, second or []):
        digest.update(f"{len(texts)}|".encode())
        for text in texts:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(4, "big") + encoded)
    return digest.hexdigest()[:40]
