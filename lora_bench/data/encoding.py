"""Encoding of texts by a tokenizer, cached as Arrow streams under a hash of all that the tokens depend on.

The hash covers the texts, the tokenizer, the length limit, the truncation and the positions of the texts, so a stale
file is never read. Cached tokens are read into memory and checked there: their ids and types must be ones that the
tokenizer can produce.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import tokenizers

from lora_bench.console.stages import stage
from lora_bench.data.text_positions import TextPositions
from lora_bench.data.truncation import kept_positions
from lora_bench.errors import Code, UserError
from lora_bench.files.arrow import to_arrow, to_numpy
from lora_bench.files.cache import CacheFiles, token_limit_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    from lora_bench.console.stages import Stage
    from lora_bench.data.special_tokens import SpecialTokens

CHUNK = 512  # pairs handed to the tokenizer at a time: larger chunks leave the processor's cache

IDS = pa.field("input_ids", pa.list_(pa.int32()))
TYPES = pa.field("token_type_ids", pa.list_(pa.int8()))
TEXTS = pa.field("text_ids", pa.list_(pa.int8()))
_COUNTS = ("truncated", "longest", "fallback")  # of a table, in the metadata of its batch


@dataclass(frozen=True)
class Encoding:
    """The texts of N examples, and all that decides their tokens.

    The tokenizer is left without padding and truncation.

    Raises:
        UserError: by `tokens`, if the tokenizer fails on a text, the tokens outside of the texts leave no room for a
            text, or the cache's environment variables are invalid.
    """

    first: list[str]
    """(N,) texts as the tokenizer reads them."""
    second: list[str] | None
    """(N,) second texts of pairs; None: single texts."""
    tokenizer: Any
    special_tokens: SpecialTokens
    max_length: int
    truncation: str
    positions: TextPositions | None
    """The assignment of tokens to the texts; None: nothing depends on it."""

    @cached_property
    def backend(self) -> Any:
        """The tokenizer of the tokenizers library, set up to read texts."""
        backend = self.tokenizer.backend_tokenizer
        self.special_tokens.configure(backend)
        return backend

    def tokens(self, *, cached: bool) -> pa.RecordBatch:
        """Return the tokens of the texts: `input_ids`, and `token_type_ids` if any of them is not 0.

        With `positions` there are `text_ids` too. `read_counts` reads the counts in the metadata.

        Args:
            cached: read the tokens from the cache, or encode the texts and write them to it. The cache is not used if
                its limit is 0, and tokens larger than the limit are not written. If a cache file is invalid or cannot
                be written, a note is printed.
        """
        files = CacheFiles("tokens", token_limit_bytes()) if cached else None
        with stage("tokenising", total=len(self.first), unit="pairs") as progress:
            if files is None or not files.limit_bytes:
                return self._encode(progress)
            key = self._key()
            max_bytes = len(self.first) * (self.max_length * 6 + 12) + (1 << 20)  # id, type, text; offsets; schema
            batch = files.read(key, self._parse, max_bytes=max_bytes)
            if batch is None:
                batch = self._encode(progress)
                if batch.nbytes <= files.limit_bytes:
                    written = files.write(key, partial(write_tokens, batch), size_bytes=batch.nbytes)
                    if written:
                        written.close()
            return batch

    def _key(self) -> str:
        """Return the cache key of the tokens: 40 hexadecimal digits, a hash of all that they depend on."""
        backend = self.backend  # its state is part of the text below
        version = f"{tokenizers.__version__}|{backend.encode_special_tokens}"
        settings = f"{self.max_length}|{self.truncation}|{self.second is not None}|{version}"
        digest = sha256(f"{backend.to_str()}|{settings}".encode())
        if self.positions is not None:
            digest.update(self.positions.key)
        for texts in (self.first, self.second or []):
            digest.update(f"{len(texts)}|".encode())
            for text in texts:
                encoded = text.encode()
                digest.update(len(encoded).to_bytes(4, "big") + encoded)
        return digest.hexdigest()[:40]

    # -- encoding --

    def _encode(self, progress: Stage) -> pa.RecordBatch:
        """Return the tokens of the texts, encoded in chunks, each of which is counted as progress.

        An empty text of which a tokenizer without special tokens makes no token is one padding token, which the network
        reads.
        """
        positions = self.positions
        for_truncation = positions if positions is not None and positions.keeps_template else TextPositions()
        ids: list[NDArray[np.int32]] = []
        types: list[NDArray[np.int8]] = []
        text_ids: list[NDArray[np.int8]] = []
        lengths: list[NDArray[np.int64]] = []
        counts = dict.fromkeys(_COUNTS, 0)
        first_row = 0
        for encodings in self._encode_in_chunks():
            sizes = np.fromiter(map(len, encodings), np.int64, len(encodings))
            for row in np.flatnonzero(sizes == 0).tolist():
                encodings[row].pad(1, pad_id=self.tokenizer.pad_token_id)
            kept: dict[int, Sequence[int]] = {}  # positions in the rows that are longer than the limit
            for row in np.flatnonzero(sizes > self.max_length).tolist():
                of_tokens = for_truncation.text_ids(encodings[row], first_row + row)
                kept[row], is_fallback = self._truncate(of_tokens)
                counts["fallback"] += is_fallback
            counts["truncated"] += len(kept)
            counts["longest"] = max(counts["longest"], 1, int(sizes.max()))
            lengths.append(np.clip(sizes, 1, self.max_length))
            total = int(lengths[-1].sum())
            ids.append(np.fromiter(_flat((e.ids for e in encodings), kept), np.int32, total))
            types.append(np.fromiter(_flat((e.type_ids for e in encodings), kept), np.int8, total))
            if positions is not None:
                of_rows = [positions.text_ids(e, first_row + row) for row, e in enumerate(encodings)]
                text_ids += [of_row[kept[row]] if row in kept else of_row for row, of_row in enumerate(of_rows)]
            first_row += len(encodings)
            progress.advance(len(encodings))
        columns: dict[str, NDArray[Any]] = {IDS.name: np.concatenate(ids)}
        flat_types = np.concatenate(types)
        if flat_types.any():
            columns[TYPES.name] = flat_types
        if positions is not None:
            columns[TEXTS.name] = np.concatenate(text_ids)
        offsets = to_arrow(np.concatenate([[0], *lengths]).cumsum().astype(np.int32))
        lists = {name: pa.ListArray.from_arrays(offsets, to_arrow(values)) for name, values in columns.items()}
        batch = pa.RecordBatch.from_arrays(list(lists.values()), names=list(lists))
        return batch.replace_schema_metadata({name: str(count) for name, count in counts.items()})

    def _encode_in_chunks(self) -> Iterator[list[Any]]:
        """Yield the encodings of `CHUNK` examples at a time.

        The tokenizer's native code uses all cores. It encodes the next chunk while the caller works on the last one,
        which takes an eighth of the processor time and would leave the other cores idle.
        """
        pairs = self.first if self.second is None else list(zip(self.first, self.second, strict=True))
        with_offsets = self.positions is not None and self.positions.spans is not None
        encode = partial(_encode_chunk, self.backend, with_offsets=with_offsets)
        chunks = (pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK))
        with ThreadPoolExecutor(1) as thread:
            pending = [thread.submit(encode, chunk) for chunk in islice(chunks, 1)]
            while pending:
                encodings = pending.pop().result()
                pending = [thread.submit(encode, chunk) for chunk in islice(chunks, 1)]
                yield encodings

    def _truncate(self, text_ids: NDArray[np.int8]) -> tuple[list[int], bool]:
        """Return the result of `kept_positions`."""
        try:
            return kept_positions(text_ids, self.max_length, self.truncation)
        except ValueError as error:
            remedy = "Give more tokens, or a shorter model.template."
            raise UserError(
                str(error), key="data.max_length", value=self.max_length, remedy=remedy, code=Code.CONFLICT
            ) from None

    # -- reading --

    def _parse(self, payload: bytes) -> pa.RecordBatch:
        """Read a cached batch, and check that the tokenizer could have given it: rows, lengths, ids, types and texts.

        Raises:
            ValueError: it could not, or is no Arrow stream.
        """
        try:
            batch = pa.ipc.open_stream(payload).read_next_batch()
            batch.validate(full=True)
            truncated, longest, fallback = read_counts(batch)
        except (pa.ArrowException, OSError, StopIteration, KeyError, ValueError) as error:
            raise ValueError(f"holds no tokens: {error}") from None
        rows, has_texts = len(self.first), self.positions is not None
        if batch.num_rows != rows or not 0 <= fallback <= truncated <= rows:
            raise ValueError(f"does not hold the tokens of {rows} rows")
        has_types = TYPES.name in batch.schema.names
        fields = [IDS, *([TYPES] if has_types else []), *([TEXTS] if has_texts else [])]
        if batch.schema.remove_metadata() != pa.schema(fields) or any(c.null_count for c in batch.columns):
            raise ValueError("holds other columns than tokens have")
        ids, *_ = [column.values for column in batch.columns]
        offsets, *other_offsets = [to_numpy(column.offsets) for column in batch.columns]
        flat = ids.null_count == 0 and offsets[0] == 0 and offsets[-1] == len(ids)
        lengths = np.diff(offsets)
        widest = int(lengths.max(initial=0))
        fits = widest == longest <= self.max_length if not truncated else widest == self.max_length < longest
        if not flat or not fits or not lengths.all() or any((o != offsets).any() for o in other_offsets):
            raise ValueError("holds rows of other lengths than tokens have")
        if _outside(ids, _highest_id(self.backend, ids)):
            raise ValueError("holds ids that the tokenizer does not have")
        texts = 1 if self.second is None else 2
        empty, short = [self.backend.encode(*[text] * texts).type_ids for text in ("", "a")]
        is_wrong = _outside(batch.column(TYPES.name).values, max(1, *short)) if has_types else any(empty)
        if is_wrong:
            raise ValueError("holds other token types than the tokenizer gives")
        if has_texts and _outside(batch.column(TEXTS.name).values, 2):
            raise ValueError("holds tokens of other texts than the first and the second")
        return batch


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


def write_tokens(batch: pa.RecordBatch, file: BinaryIO) -> None:
    """Write a batch as an Arrow stream, as the cache has it."""
    with pa.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)


def read_counts(batch: pa.RecordBatch) -> tuple[int, ...]:
    """Return the counts in a batch's metadata: `truncated`, `longest` and `fallback` of `TokenTable`.

    Raises:
        KeyError: one is missing.
        ValueError: one is no whole number.
    """
    return tuple(int((batch.schema.metadata or {})[name.encode()]) for name in _COUNTS)


def _outside(values: pa.Array, highest: int) -> bool:
    """Return whether a value is missing, negative or above the highest; False if there are no values."""
    numbers = to_numpy(values) if values.null_count == 0 else np.array([-1])
    return bool(len(numbers)) and not 0 <= numbers.min() <= numbers.max() <= highest


def _highest_id(backend: Any, ids: pa.Array) -> int:
    """Return the highest id that these may have: the size of the vocabulary less 1 if none is above it.

    Otherwise it is the highest id of the vocabulary, which may have gaps.
    """
    size = backend.get_vocab_size()
    return size - 1 if not _outside(ids, size - 1) else max(backend.get_vocab().values(), default=-1)
