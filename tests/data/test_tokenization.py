"""Token tables equal the output of the tokenizer's own call, and a cached table is read without tokenising again.

A cached file is never stale: its name is a hash of everything that the tokens depend on.
"""

from __future__ import annotations

import errno
import os
import resource
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers

from lora_bench.data import encoding
from lora_bench.data.encoding import Encoding
from lora_bench.data.examples import Examples
from lora_bench.data.special_tokens import SpecialTokens
from lora_bench.data.tokenization import TokenTable, tokenize
from lora_bench.files.cache import TRAILER_BYTES, CacheFiles
from tests import forked
from tests.helpers import TINY

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.backbones.base import Backbone

FIRST = [
    "How do I learn Go?",
    "",
    "naïve café — 東京 🦊 \u202e",
    "NA",
    'quotes " and \ttabs',
    "long " * 80,
    "short",
    "x" * 300,
]
SECOND = [
    "What is the best way to learn Go?",
    "",
    "ÅÅ é é",
    "null",
    "two\nlines",
    "short",
    "long " * 80,
    "y" * 300,
]
COLUMNS = ["question1", "question2"]


def examples(first: list[str] = FIRST, second: list[str] | None = SECOND) -> Examples:
    texts = (first,) if second is None else (first, second)
    n = len(first)
    return Examples(np.arange(10, 10 + n), texts, np.arange(n) % 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cached tokens; it does not exist yet."""
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def rows(table: TokenTable) -> list[list[int]]:
    ends = table.offsets + table.lengths
    return [table.values[a:b].tolist() for a, b in zip(table.offsets, ends, strict=True)]


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("limit", [16, 64, 512])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_tokens_equal_those_of_the_tokenizers_own_call(
    backbone: Callable[..., Backbone], cache: Path, family: str, single: bool, limit: int, cached: bool
) -> None:
    model = backbone(family)
    pairs, columns = examples(second=None if single else SECOND), COLUMNS[:1] if single else COLUMNS
    table = tokenize(pairs, columns, model, limit, cached=cached)
    texts = model.render(list(zip(columns, pairs.texts, strict=True)))
    sides = [side for side in texts if side is not None]
    expected = model.tokenizer(*sides, truncation="longest_first", max_length=limit)
    assert rows(table) == expected["input_ids"]
    assert table.lengths.tolist() == [len(ids) for ids in expected["input_ids"]]
    untruncated = model.tokenizer(*sides, truncation=False)["input_ids"]
    assert table.truncated == sum(len(ids) > limit for ids in untruncated)
    assert table.ids.tolist() == pairs.ids.tolist()
    assert table.labels is pairs.labels
    if family == "tiny_bert" and not single:
        flat = [type_id for types in expected["token_type_ids"] for type_id in types]
        assert table.types is not None
        assert table.types.tolist() == flat
    else:
        assert table.types is None  # one segment, or a family without token types
    assert cache.exists() == cached


def test_cached_tokens_are_read_without_calling_the_tokenizer(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbone()
    cold = tokenize(examples(), COLUMNS, model, 64)
    monkeypatch.setattr(Encoding, "_encode", lambda *arguments: pytest.fail("tokenised again"))
    model.tokenizer(["a"], padding=True, truncation=True, max_length=5)  # truncation and padding are not in the key
    warm = tokenize(examples(), COLUMNS, model, 64)
    assert rows(warm) == rows(cold)
    assert warm.truncated == cold.truncated > 0
    assert warm.types is not None
    assert cold.types is not None
    assert warm.types.tolist() == cold.types.tolist()
    assert len(files(cache)) == 1


def test_settings_and_texts_that_change_tokens_change_the_cached_file(
    backbone: Callable[..., Backbone], cache: Path
) -> None:
    bert, roberta = backbone("tiny_bert"), backbone("tiny_roberta")
    plain = ["ab", "c"]

    def new_files(pairs: Examples, model: Backbone = bert, limit: int = 64) -> int:
        count = len(files(cache)) if cache.exists() else 0
        tokenize(pairs, COLUMNS[: len(pairs.texts)], model, limit)
        return len(files(cache)) - count

    assert new_files(examples(plain, plain)) == 1
    assert new_files(examples(plain, plain), model=roberta) == 1
    assert new_files(examples(plain, plain), limit=65) == 1
    assert new_files(examples(["ab", "d"], plain)) == 1
    assert new_files(examples(["a", "bc"], plain)) == 1  # the same characters, split differently
    assert new_files(examples(plain, None)) == 1
    assert new_files(examples([*plain, *plain], None)) == 1  # the texts of the pairs, as single texts
    assert new_files(examples(plain, plain)) == 0
    assert new_files(Examples(np.arange(2), (plain, plain), None)) == 0  # labels and ids are not in the file


def test_column_names_change_the_cached_file_of_t5(backbone: Callable[..., Backbone], cache: Path) -> None:
    model = backbone("tiny_t5")
    tokenize(examples(["a"], ["b"]), COLUMNS, model, 64)
    tokenize(examples(["a"], ["b"]), ["sentence1", "sentence2"], model, 64)
    assert len(files(cache)) == 2


def test_a_loaded_table_does_not_depend_on_its_file(backbone: Callable[..., Backbone], cache: Path) -> None:
    model = backbone()
    cold = rows(tokenize(examples(), COLUMNS, model, 64))
    table = tokenize(examples(), COLUMNS, model, 64)
    (path,) = cache.iterdir()
    os.truncate(path, 0)  # with a mapped file, this would end the process
    assert rows(table) == cold
    assert not table.values.flags.writeable


def test_tables_longer_than_a_chunk_are_tokenized_alike(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(tokenize(examples(), COLUMNS, backbone(), 32, cached=False))
    monkeypatch.setattr(encoding, "CHUNK", 3)
    assert rows(tokenize(examples(), COLUMNS, backbone(), 32, cached=False)) == whole


def test_an_unwritable_cache_is_named_and_not_used(
    backbone: Callable[..., Backbone],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "file"))
    table = tokenize(examples(), COLUMNS, backbone(), 64)
    assert str(tmp_path / "file") in capfd.readouterr().err
    assert rows(table) == rows(tokenize(examples(), COLUMNS, backbone(), 64, cached=False))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("written", [0, 300, 1500])
def test_a_full_disk_leaves_no_partial_file(
    backbone: Callable[..., Backbone], cache: Path, capsys: pytest.CaptureFixture[str], written: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = backbone()
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, limits[1]))
    try:
        table = tokenize(examples(), COLUMNS, model, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in capsys.readouterr().err
    assert rows(table) == rows(tokenize(examples(), COLUMNS, model, 64, cached=False))
    assert files(cache) == []


@pytest.mark.parametrize("family", TINY)
def test_a_file_with_a_changed_byte_is_named_and_written_again(
    backbone: Callable[..., Backbone], cache: Path, capfd: pytest.CaptureFixture[str], family: str
) -> None:
    model = backbone(family)
    cold = tokenize(examples(), COLUMNS, model, 16)
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    for position in range(0, len(sound), 97):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        warm = tokenize(examples(), COLUMNS, model, 16)
        assert capfd.readouterr().err.count(str(path)) == 1
        assert (rows(warm), warm.truncated) == (rows(cold), cold.truncated)
        assert path.read_bytes() == sound


def column(batch: pa.RecordBatch, name: str, change: Callable[[pa.ListArray], Any]) -> pa.RecordBatch:
    columns = {field: batch.column(field) for field in batch.schema.names}
    changed = pa.RecordBatch.from_pydict(columns | {name: change(columns[name])})
    return changed.replace_schema_metadata(batch.schema.metadata)


def first(value: int) -> Callable[[pa.ListArray], pa.Array]:
    """Return a function that replaces the first value of the first row."""

    def change(array: pa.ListArray) -> pa.Array:
        values = array.values.to_numpy().copy()
        values[0] = value
        return pa.ListArray.from_arrays(array.offsets, pa.array(values))

    return change


def longer(array: pa.ListArray) -> pa.Array:
    """Return the rows with all values in the first one."""
    offsets = np.full(len(array) + 1, len(array.values), np.int32)
    offsets[0] = 0
    return pa.ListArray.from_arrays(pa.array(offsets), array.values)


def with_null(array: pa.ListArray) -> pa.Array:
    return pa.array([None, *array.to_pylist()[1:]], array.type)


def with_null_value(array: pa.ListArray) -> pa.Array:
    head, *rest = array.to_pylist()
    return pa.array([[None, *head[1:]], *rest], array.type)


def counted(batch: pa.RecordBatch, **counts: str) -> pa.RecordBatch:
    """Return the batch with these counts in its metadata."""
    metadata = batch.schema.metadata | {name.encode(): count for name, count in counts.items()}
    changed: pa.RecordBatch = batch.replace_schema_metadata(metadata)
    return changed


WRONG: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "a row less": lambda batch: batch.slice(1),
    "a row more": lambda batch: pa.concat_batches([batch, batch.slice(0, 1)]),
    "no rows": lambda batch: batch.slice(0, 0),
    "id outside the vocabulary": lambda batch: column(batch, "input_ids", first(2**31 - 1)),
    "negative id": lambda batch: column(batch, "input_ids", first(-1)),
    "type other than 0 and 1": lambda batch: column(batch, "token_type_ids", first(2)),
    "negative type": lambda batch: column(batch, "token_type_ids", first(-1)),
    "row longer than the limit": lambda batch: column(batch, "input_ids", longer),
    "types of other rows": lambda batch: column(batch, "token_type_ids", longer),
    "null row": lambda batch: column(batch, "input_ids", with_null),
    "null id": lambda batch: column(batch, "input_ids", with_null_value),
    "null type": lambda batch: column(batch, "token_type_ids", with_null_value),
    "ids of 64 bits": lambda batch: column(batch, "input_ids", lambda array: array.cast(pa.list_(pa.int64()))),
    "ids of another type": lambda batch: column(batch, "input_ids", lambda array: array.cast(pa.list_(pa.float32()))),
    "no lists": lambda batch: column(batch, "input_ids", lambda array: pa.array(range(len(array)))),
    "no types": lambda batch: batch.select(["input_ids"]),
    "no ids": lambda batch: batch.select(["token_type_ids"]),
    "other names": lambda batch: batch.rename_columns(["ids", "types"]),
    "no metadata": lambda batch: batch.replace_schema_metadata(None),
    "count of another type": lambda batch: counted(batch, truncated="many"),
    "negative count": lambda batch: counted(batch, truncated="-1"),
    "count beyond the rows": lambda batch: counted(batch, truncated="9"),
    "no count": lambda batch: batch.replace_schema_metadata({"truncated": "3"}),
    "longest row within the limit": lambda batch: counted(batch, longest="64"),
    "longest row beyond the limit but none truncated": lambda batch: counted(batch, truncated="0"),
    "more exceptions than truncated rows": lambda batch: counted(batch, fallback="8"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_cached_content_that_no_tokenizer_writes_is_replaced(
    backbone: Callable[..., Backbone],
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    wrong: Callable[[pa.RecordBatch], pa.RecordBatch],
) -> None:
    """The checksum of the file is right."""
    model = backbone()
    cold = tokenize(examples(), COLUMNS, model, 64)
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    batch = pa.ipc.open_stream(sound[:-TRAILER_BYTES]).read_next_batch()
    invalid = wrong(batch)
    written = CacheFiles("tokens").write(path.stem, partial(encoding.write_tokens, invalid), size_bytes=0)
    assert written is not None
    written.close()
    warm = tokenize(examples(), COLUMNS, model, 64)
    assert capfd.readouterr().err.count(str(path)) == 1
    assert (rows(warm), warm.truncated) == (rows(cold), cold.truncated)
    assert path.read_bytes() == sound


@pytest.mark.parametrize("payload", [b"", b"\0" * 500, b"ARROW1\0\0", b"\xff" * 64])
def test_a_file_with_a_right_checksum_but_no_arrow_stream_is_not_used(
    backbone: Callable[..., Backbone], cache: Path, capfd: pytest.CaptureFixture[str], payload: bytes
) -> None:
    model = backbone()
    cold = tokenize(examples(), COLUMNS, model, 64)
    (path,) = cache.iterdir()
    written = CacheFiles("tokens").write(path.stem, lambda file: file.write(payload), size_bytes=0)
    assert written is not None
    written.close()
    assert rows(tokenize(examples(), COLUMNS, model, 64)) == rows(cold)
    assert str(path) in capfd.readouterr().err


def test_a_vocabulary_may_have_gaps(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tokenizers.models.WordLevel({"[UNK]": 0, "far": 9}, unk_token="[UNK]")
    backbone = SimpleNamespace(
        tokenizer=SimpleNamespace(backend_tokenizer=tokenizers.Tokenizer(model)),
        render=lambda columns: (columns[0][1], None),
        text_positions=lambda columns: None,
        special_tokens=SpecialTokens(),
    )
    for _ in range(2):
        assert tokenize(examples(["far"], None), COLUMNS[:1], backbone, 8).values.tolist() == [9]  # type: ignore[arg-type]
    assert capfd.readouterr().err == ""
    assert len(files(cache)) == 1


def test_the_token_cache_is_bounded_and_the_least_recently_used_is_removed(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbone()
    largest = 0
    for allowed in (0, 1):
        monkeypatch.setenv("LORA_BENCH_TOKEN_CACHE_BYTES", str(allowed))
        tokenize(examples(), COLUMNS, model, 64)
        assert not cache.exists()
    monkeypatch.delenv("LORA_BENCH_TOKEN_CACHE_BYTES")
    for length in range(40, 50):
        tokenize(examples(), COLUMNS, model, length)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (length, length))
        largest = max(largest, newest.stat().st_size)
    monkeypatch.setenv("LORA_BENCH_TOKEN_CACHE_BYTES", str(3 * largest))
    tokenize(examples(), COLUMNS, model, 40)  # the oldest is the latest used now
    tokenize(examples(), COLUMNS, model, 50)
    assert 2 <= len(files(cache)) <= 3
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 3 * largest
    monkeypatch.setattr(Encoding, "_encode", lambda *arguments: pytest.fail("tokenised again"))
    tokenize(examples(), COLUMNS, model, 40)
    tokenize(examples(), COLUMNS, model, 50)
    monkeypatch.setenv("LORA_BENCH_TOKEN_CACHE_BYTES", "0")
    with pytest.raises(pytest.fail.Exception):
        tokenize(examples(), COLUMNS, model, 40)


def fill_cache(ready: str, name: str) -> None:
    """Tokenise tables as soon as another process does, and print that it is done; a warning is an error."""
    warnings.simplefilter("error")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backbone: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(backend_tokenizer=tokenizer),
        render=lambda columns: (columns[0][1], None),
        text_positions=lambda columns: None,
        special_tokens=SpecialTokens(),
    )
    Path(ready, name).touch()
    while len(list(Path(ready).iterdir())) < 2:  # both are ready
        time.sleep(0.001)
    for i in range(20):
        texts = ["a b a"] * (500 + i)
        table = tokenize(Examples(np.arange(len(texts)), (texts,), None), ["text"], backbone, 8)
        assert table.values.sum() == 4 * len(texts), i
    print("done", flush=True)


def test_two_processes_fill_the_cache_at_the_same_time(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "ready").mkdir()
    processes = [forked.Forked(fill_cache, str(tmp_path / "ready"), name) for name in ("one", "two")]
    for process in processes:
        assert (process.wait(), process.out, process.err) == (0, "done\n", "")
    assert len(files(cache)) == 20
    assert all(name.endswith(".arrow") for name in files(cache))
