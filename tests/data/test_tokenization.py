"""Token tables hold what the tokenizer's own call gives, and the cache gives it back without asking again.

A stale file can never be met: whatever the tokens depend on is in the file's name.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers

from lora_bench.data import tokenization
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import TokenTable, tokenize
from lora_bench.files.cache import TRAILER_BYTES, CacheFiles
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
    """An empty cache; the folder in which its files will lie."""
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
def test_tokens_are_those_of_the_tokenizers_own_call(
    backbone: Callable[..., Backbone], cache: Path, family: str, single: bool, limit: int, cached: bool
) -> None:
    made = backbone(family)
    given, columns = examples(second=None if single else SECOND), COLUMNS[:1] if single else COLUMNS
    table = tokenize(given, columns, made, limit, cached=cached)
    texts = made.render(list(zip(columns, given.texts, strict=True)))
    sides = [side for side in texts if side is not None]
    expected = made.tokenizer(*sides, truncation="longest_first", max_length=limit)
    assert rows(table) == expected["input_ids"]
    assert table.lengths.tolist() == [len(ids) for ids in expected["input_ids"]]
    untruncated = made.tokenizer(*sides, truncation=False)["input_ids"]
    assert table.truncated == sum(len(ids) > limit for ids in untruncated)
    assert table.ids.tolist() == given.ids.tolist()
    assert table.labels is given.labels
    if family == "tiny_bert" and not single:
        flat = [t for types in expected["token_type_ids"] for t in types]
        assert table.types is not None
        assert table.types.tolist() == flat
    else:
        assert table.types is None  # one segment, or a family that knows none
    assert cache.exists() == cached


def test_a_second_time_the_tokenizer_is_not_called(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backbone()
    cold = tokenize(examples(), COLUMNS, made, 64)
    monkeypatch.setattr(tokenization, "_encode", lambda *arguments: pytest.fail("tokenised again"))
    made.tokenizer(["a"], padding=True, truncation=True, max_length=5)  # its state of the moment is not part of the key
    warm = tokenize(examples(), COLUMNS, made, 64)
    assert rows(warm) == rows(cold)
    assert warm.truncated == cold.truncated > 0
    assert warm.types is not None
    assert cold.types is not None
    assert warm.types.tolist() == cold.types.tolist()
    assert len(files(cache)) == 1


def test_whatever_tokens_depend_on_makes_another_file(backbone: Callable[..., Backbone], cache: Path) -> None:
    bert, roberta = backbone("tiny_bert"), backbone("tiny_roberta")
    plain = ["ab", "c"]

    def added(given: Examples, made: Backbone = bert, limit: int = 64) -> int:
        before = len(files(cache)) if cache.exists() else 0
        tokenize(given, COLUMNS[: len(given.texts)], made, limit)
        return len(files(cache)) - before

    assert added(examples(plain, plain)) == 1
    assert added(examples(plain, plain), made=roberta) == 1
    assert added(examples(plain, plain), limit=65) == 1
    assert added(examples(["ab", "d"], plain)) == 1
    assert added(examples(["a", "bc"], plain)) == 1  # the same letters, cut elsewhere
    assert added(examples(plain, None)) == 1
    assert added(examples([*plain, *plain], None)) == 1  # the pair's texts, as single ones
    assert added(examples(plain, plain)) == 0
    assert added(Examples(np.arange(2), (plain, plain), None)) == 0  # labels and ids are not in the file


def test_t5_reads_its_column_names_and_task(backbone: Callable[..., Backbone], cache: Path) -> None:
    made = backbone("tiny_t5")
    tokenize(examples(["a"], ["b"]), COLUMNS, made, 64)
    tokenize(examples(["a"], ["b"]), ["sentence1", "sentence2"], made, 64)
    assert len(files(cache)) == 2


def test_a_loaded_table_does_not_hang_on_its_file(backbone: Callable[..., Backbone], cache: Path) -> None:
    made = backbone()
    cold = rows(tokenize(examples(), COLUMNS, made, 64))
    table = tokenize(examples(), COLUMNS, made, 64)
    (path,) = cache.iterdir()
    os.truncate(path, 0)  # of a mapped file this would end the process
    assert rows(table) == cold
    assert not table.values.flags.writeable


def test_a_table_may_be_longer_than_one_chunk(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(tokenize(examples(), COLUMNS, backbone(), 32, cached=False))
    monkeypatch.setattr(tokenization, "CHUNK", 3)
    assert rows(tokenize(examples(), COLUMNS, backbone(), 32, cached=False)) == whole


def test_a_cache_that_cannot_be_written_is_named_and_done_without(
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
def test_a_full_disk_leaves_nothing_behind(
    backbone: Callable[..., Backbone], cache: Path, capsys: pytest.CaptureFixture[str], written: int
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = backbone()
    resource.setrlimit(resource.RLIMIT_FSIZE, (written, limits[1]))
    try:
        table = tokenize(examples(), COLUMNS, made, 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in capsys.readouterr().err
    assert rows(table) == rows(tokenize(examples(), COLUMNS, made, 64, cached=False))
    assert files(cache) == []


@pytest.mark.parametrize("family", TINY)
def test_every_changed_byte_is_noticed(
    backbone: Callable[..., Backbone], cache: Path, capfd: pytest.CaptureFixture[str], family: str
) -> None:
    made = backbone(family)
    cold = tokenize(examples(), COLUMNS, made, 16)
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    for place in range(0, len(sound), 97):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        warm = tokenize(examples(), COLUMNS, made, 16)
        assert capfd.readouterr().err.count(str(path)) == 1
        assert (rows(warm), warm.truncated) == (rows(cold), cold.truncated)
        assert path.read_bytes() == sound


def column(batch: pa.RecordBatch, name: str, change: Callable[[pa.ListArray], Any]) -> pa.RecordBatch:
    columns = {field: batch.column(field) for field in batch.schema.names}
    made = pa.RecordBatch.from_pydict(columns | {name: change(columns[name])})
    return made.replace_schema_metadata(batch.schema.metadata)


def first(value: int) -> Callable[[pa.ListArray], pa.Array]:
    """Another first value."""

    def change(array: pa.ListArray) -> pa.Array:
        values = array.values.to_numpy().copy()
        values[0] = value
        return pa.ListArray.from_arrays(array.offsets, pa.array(values))

    return change


def longer(array: pa.ListArray) -> pa.Array:
    """All tokens in the first row."""
    offsets = np.full(len(array) + 1, len(array.values), np.int32)
    offsets[0] = 0
    return pa.ListArray.from_arrays(pa.array(offsets), array.values)


def with_null(array: pa.ListArray) -> pa.Array:
    return pa.array([None, *array.to_pylist()[1:]], array.type)


def with_null_value(array: pa.ListArray) -> pa.Array:
    head, *rest = array.to_pylist()
    return pa.array([[None, *head[1:]], *rest], array.type)


WRONG: dict[str, Callable[[pa.RecordBatch], pa.RecordBatch]] = {
    "a row less": lambda batch: batch.slice(1),
    "a row more": lambda batch: pa.concat_batches([batch, batch.slice(0, 1)]),
    "no rows": lambda batch: batch.slice(0, 0),
    "id beyond the vocabulary": lambda batch: column(batch, "input_ids", first(2**31 - 1)),
    "negative id": lambda batch: column(batch, "input_ids", first(-1)),
    "type beyond those of pairs": lambda batch: column(batch, "token_type_ids", first(2)),
    "negative type": lambda batch: column(batch, "token_type_ids", first(-1)),
    "row beyond the limit": lambda batch: column(batch, "input_ids", longer),
    "types of other rows": lambda batch: column(batch, "token_type_ids", longer),
    "null row": lambda batch: column(batch, "input_ids", with_null),
    "null id": lambda batch: column(batch, "input_ids", with_null_value),
    "null type": lambda batch: column(batch, "token_type_ids", with_null_value),
    "ids of 64 bits": lambda batch: column(batch, "input_ids", lambda array: array.cast(pa.list_(pa.int64()))),
    "ids of another kind": lambda batch: column(batch, "input_ids", lambda array: array.cast(pa.list_(pa.float32()))),
    "no lists": lambda batch: column(batch, "input_ids", lambda array: pa.array(range(len(array)))),
    "no types": lambda batch: batch.select(["input_ids"]),
    "no ids": lambda batch: batch.select(["token_type_ids"]),
    "other names": lambda batch: batch.rename_columns(["ids", "types"]),
    "no metadata": lambda batch: batch.replace_schema_metadata(None),
    "count of another kind": lambda batch: batch.replace_schema_metadata({"truncated": "many"}),
    "negative count": lambda batch: batch.replace_schema_metadata({"truncated": "-1"}),
    "count beyond the rows": lambda batch: batch.replace_schema_metadata({"truncated": "9"}),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_what_the_tokenizer_cannot_have_given_is_not_used(
    backbone: Callable[..., Backbone],
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    wrong: Callable[[pa.RecordBatch], pa.RecordBatch],
) -> None:
    """The file is sound: its checksum is right."""
    made = backbone()
    cold = tokenize(examples(), COLUMNS, made, 64)
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    batch = pa.ipc.open_stream(sound[:-TRAILER_BYTES]).read_next_batch()
    other = wrong(batch)
    written = CacheFiles("tokens").write(path.stem, partial(tokenization._write, other), size_bytes=0)
    assert written is not None
    written.close()
    warm = tokenize(examples(), COLUMNS, made, 64)
    assert capfd.readouterr().err.count(str(path)) == 1
    assert (rows(warm), warm.truncated) == (rows(cold), cold.truncated)
    assert path.read_bytes() == sound


@pytest.mark.parametrize("payload", [b"", b"\0" * 500, b"ARROW1\0\0", b"\xff" * 64])
def test_a_sound_file_that_is_no_arrow_stream_is_not_used(
    backbone: Callable[..., Backbone], cache: Path, capfd: pytest.CaptureFixture[str], payload: bytes
) -> None:
    made = backbone()
    cold = tokenize(examples(), COLUMNS, made, 64)
    (path,) = cache.iterdir()
    written = CacheFiles("tokens").write(path.stem, lambda file: file.write(payload), size_bytes=0)
    assert written is not None
    written.close()
    assert rows(tokenize(examples(), COLUMNS, made, 64)) == rows(cold)
    assert str(path) in capfd.readouterr().err


def test_a_vocabulary_may_have_gaps(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tokenizers.models.WordLevel({"[UNK]": 0, "far": 9}, unk_token="[UNK]")
    made = SimpleNamespace(
        tokenizer=SimpleNamespace(backend_tokenizer=tokenizers.Tokenizer(model)),
        render=lambda columns: (columns[0][1], None),
    )
    for _ in range(2):
        assert tokenize(examples(["far"], None), COLUMNS[:1], made, 8).values.tolist() == [9]  # type: ignore[arg-type]
    assert capfd.readouterr().err == ""
    assert len(files(cache)) == 1


def test_tokens_are_bounded_in_size(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = backbone()
    limit = 0
    for allowed in (0, 1):
        monkeypatch.setenv("LORA_BENCH_TOKEN_CACHE_BYTES", str(allowed))
        tokenize(examples(), COLUMNS, made, 64)
        assert not cache.exists()
    monkeypatch.delenv("LORA_BENCH_TOKEN_CACHE_BYTES")
    for length in range(40, 50):
        tokenize(examples(), COLUMNS, made, length)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (length, length))
        limit = max(limit, newest.stat().st_size)
    monkeypatch.setenv("LORA_BENCH_TOKEN_CACHE_BYTES", str(3 * limit))
    tokenize(examples(), COLUMNS, made, 40)  # the oldest is used once more
    tokenize(examples(), COLUMNS, made, 50)
    assert 2 <= len(files(cache)) <= 3
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 3 * limit
    monkeypatch.setattr(tokenization, "_encode", lambda *arguments: pytest.fail("tokenised again"))
    tokenize(examples(), COLUMNS, made, 40)
    tokenize(examples(), COLUMNS, made, 50)
    monkeypatch.setenv("LORA_BENCH_TOKEN_CACHE_BYTES", "0")
    with pytest.raises(pytest.fail.Exception):
        tokenize(examples(), COLUMNS, made, 40)


WRITER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_bench.data.tokenization import tokenize
from lora_bench.data.examples import Examples

made = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
backbone = SimpleNamespace(
    tokenizer=SimpleNamespace(backend_tokenizer=made), render=lambda columns: (columns[0][1], None)
)
folder, me = Path(sys.argv[1]), sys.argv[2]
(folder / me).touch()
while len(list(folder.iterdir())) < 2:  # both are ready
    time.sleep(0.001)
for i in range(20):
    texts = ["a b a"] * (500 + i)
    table = tokenize(Examples(np.arange(len(texts)), (texts,), None), ["text"], backbone, 8)
    assert table.values.sum() == 4 * len(texts), i
print("fine")
"""


def test_two_processes_may_fill_the_cache_at_once(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path / "ready")]
    root = str(Path(__file__).parents[2])
    both = [
        subprocess.Popen([*command, name], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "fine\n", "")
    assert len(files(cache)) == 20
    assert all(name.endswith(".arrow") for name in files(cache))
