"""Where examples that are longer than `data.max_length` lose tokens, and what a user is told of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lora_bench.config.build import build_data
from lora_bench.data.examples import Examples
from lora_bench.data.tokenization import TokenTable, scoring_table, tokenize, truncation_notes
from lora_bench.errors import Code
from tests.command_line import refuses
from tests.helpers import SMALL_TOY, TINY, composed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_bench.backbones.base import Backbone

LONG, LONGER = " ".join(f"word{i}" for i in range(40)), " ".join(f"name{i}" for i in range(60))
FIRST = ["short", LONG, LONG, "How do I learn Go?", ""]
SECOND = ["short", "tiny", LONGER, LONG, LONGER]
COLUMNS = ["question1", "question2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cached tokens."""
    monkeypatch.setenv("LORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def examples(first: list[str] = FIRST, second: list[str] | None = SECOND) -> Examples:
    return Examples(np.arange(len(first)), (first,) if second is None else (first, second), None)


def rows(table: TokenTable) -> list[list[int]]:
    ends = table.offsets + table.lengths
    return [table.values[a:b].tolist() for a, b in zip(table.offsets, ends, strict=True)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("truncation", ["first", "second"])
@pytest.mark.parametrize("family", ["tiny_bert", "tiny_roberta"])
def test_one_of_two_texts_is_truncated_as_the_tokenizers_own_call_does(
    backbone: Callable[..., Backbone], family: str, truncation: str, reverse: bool
) -> None:
    model = backbone(family)
    pairs = examples([LONG, "short", LONG], ["a b", "c", "the same"])
    if truncation == "second":
        pairs = examples(pairs.texts[1], pairs.texts[0])
    table = tokenize(pairs, COLUMNS, model, 32, truncation=truncation, reverse=reverse)
    only = "only_first" if (truncation == "first") != reverse else "only_second"
    sides = pairs.texts[::-1] if reverse else pairs.texts
    expected = model.tokenizer(*sides, truncation=only, max_length=32)
    assert rows(table) == expected["input_ids"]
    if family == "tiny_bert":
        assert table.types is not None
        assert table.types.tolist() == [type_id for types in expected["token_type_ids"] for type_id in types]
    assert (table.truncated, table.fallback) == (2, 0)
    assert table.longest == max(map(len, model.tokenizer(*sides)["input_ids"]))


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_roberta"])
def test_a_text_that_leaves_no_room_is_truncated_too(backbone: Callable[..., Backbone], family: str) -> None:
    model = backbone(family)
    expected = rows(tokenize(examples(), COLUMNS, model, 32))
    table = tokenize(examples(), COLUMNS, model, 32, truncation="first")
    fallback = [2, 3, 4]  # whose second text alone is too long
    assert [rows(table)[row] for row in fallback] == [expected[row] for row in fallback]
    assert (table.truncated, table.fallback) == (4, len(fallback))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_the_middle_of_the_longer_text_is_left_out(
    backbone: Callable[..., Backbone], family: str, single: bool
) -> None:
    model = backbone(family)
    pairs, columns = (examples(second=None), COLUMNS[:1]) if single else (examples(), COLUMNS)
    table = tokenize(pairs, columns, model, 32, truncation="middle")
    whole = tokenize(pairs, columns, model, 10_000)
    at_end = tokenize(pairs, columns, model, 32)
    assert table.truncated == at_end.truncated > 0
    assert table.lengths.tolist() == at_end.lengths.tolist()
    for row, (kept, all_tokens) in enumerate(zip(rows(table), rows(whole), strict=True)):
        if len(all_tokens) <= 32:
            assert kept == all_tokens
            continue
        assert len(kept) == 32
        assert kept[-4:] == all_tokens[-4:], row  # of the last text that is truncated, and the special tokens
        assert kept[:4] == all_tokens[:4]
    if family == "tiny_bert" and not single:
        assert table.types is not None
        assert table.types.sum() == at_end.types.sum()  # type: ignore[union-attr]


def test_a_truncated_text_keeps_a_half_at_each_end(backbone: Callable[..., Backbone]) -> None:
    model = backbone("tiny_bert")
    table = tokenize(examples([LONG], None), COLUMNS[:1], model, 9, truncation="middle")
    start, *tokens, end = rows(tokenize(examples([LONG], None), COLUMNS[:1], model, 10_000))[0]
    assert rows(table) == [[start, *tokens[:4], *tokens[-3:], end]]


def test_each_truncation_has_a_cached_file_of_its_own(backbone: Callable[..., Backbone], cache: Path) -> None:
    model = backbone()
    strategies = ("longest_first", "first", "second", "middle")
    cold = {name: tokenize(examples(), COLUMNS, model, 32, truncation=name) for name in strategies}
    assert len(list(cache.iterdir())) == len(strategies)
    for name, table in cold.items():
        warm = tokenize(examples(), COLUMNS, model, 32, truncation=name)
        assert rows(warm) == rows(table)
        assert (warm.truncated, warm.longest, warm.fallback) == (table.truncated, table.longest, table.fallback)


def test_a_text_of_a_template_cannot_be_named(backbone: Callable[..., Backbone]) -> None:
    model = backbone("tiny_t5")
    with refuses(Code.UNSUPPORTED, key="data.truncation") as caught:
        tokenize(examples(), COLUMNS, model, 32, truncation="second")
    assert "middle" in str(caught.value.remedy)
    single = tokenize(examples(second=None), COLUMNS[:1], model, 32, truncation="first")
    assert rows(single) == rows(tokenize(examples(second=None), COLUMNS[:1], model, 32))


def test_the_second_of_one_text_is_refused() -> None:
    with refuses(Code.CONFLICT, key="data.truncation"):
        build_data(composed("data=sst2", "data.truncation=second").data)


def test_settings_reach_the_tokens(backbone: Callable[..., Backbone]) -> None:
    data = build_data(composed(*SMALL_TOY, "data.truncation=middle", "data.max_length=32").data)
    model: Any = backbone()
    table = scoring_table(examples(), data, model, both_orders=True)
    assert rows(table) == rows(tokenize(examples(), COLUMNS, model, 32, truncation="middle"))
    assert table.reversed_view is not None
    assert table.reversed_view.truncated == table.truncated


def test_truncated_examples_are_told_with_their_share_and_the_longest(backbone: Callable[..., Backbone]) -> None:
    data = build_data(composed(*SMALL_TOY, "data.truncation=first", "data.max_length=32").data)
    table = scoring_table(examples(), data, backbone(), both_orders=False)
    short = scoring_table(examples(["a"], ["b"]), data, backbone(), both_orders=False)
    lost, fallback = truncation_notes({"train": table, "validation": short, "test": table}, data)
    assert "80 % of 5 examples of train, 80 % of 5 examples of test are longer" in lost
    assert f"data.max_length=32 and lose tokens; the longest has {table.longest}." in lost
    assert "6 of these examples" in fallback
    assert "second text" in fallback
    assert truncation_notes({"train": short}, data) == []
