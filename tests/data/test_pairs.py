"""Token tables hold what the tokenizer's own call gives, and the cache gives it back without asking again.

A stale file can never be met: whatever the tokens depend on is in the file's name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from lora_bench.data import pairs
from lora_bench.data.examples import Examples
from lora_bench.data.pairs import TokenTable, tokenize
from lora_bench.errors import UserError
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
    monkeypatch.setattr(pairs, "_encode", lambda *arguments: pytest.fail("tokenised again"))
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


def test_cached_tables_lie_on_disk_not_in_memory(backbone: Callable[..., Backbone], cache: Path) -> None:
    made, many = backbone(), ["How do I learn Go?"] * 20_000
    given = examples(many, None)
    tokenize(given, COLUMNS[:1], made, 64)
    before = pa.total_allocated_bytes()
    table = tokenize(given, COLUMNS[:1], made, 64)
    assert table.values.nbytes > 1_000_000
    assert pa.total_allocated_bytes() - before < 100_000
    assert not table.values.flags.owndata
    assert not table.values.flags.writeable


def test_a_table_may_be_longer_than_one_chunk(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rows(tokenize(examples(), COLUMNS, backbone(), 32, cached=False))
    monkeypatch.setattr(pairs, "CHUNK", 3)
    assert rows(tokenize(examples(), COLUMNS, backbone(), 32, cached=False)) == whole


def test_a_cache_that_cannot_be_written_is_refused_and_named(
    backbone: Callable[..., Backbone], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"token cache cannot be written.*LORA_BENCH_CACHE") as refused:
        tokenize(examples(), COLUMNS, backbone(), 64)
    assert str(tmp_path / "file") in str(refused.value)
    assert len(tokenize(examples(), COLUMNS, backbone(), 64, cached=False)) == len(FIRST)


def test_a_full_disk_leaves_nothing_behind(
    backbone: Callable[..., Backbone], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pairs.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        tokenize(examples(), COLUMNS, backbone(), 64)
    assert files(cache) == []


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "own"))
    assert pairs.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LORA_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pairs.cache_folder() == tmp_path / "xdg" / "lora-bench"


WRITER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_bench.data.pairs import tokenize
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
