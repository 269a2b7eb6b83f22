"""`UserError` is one paragraph that names place, value and remedy; `nearest` finds what was meant."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_bench.errors import Code, UserError, nearest

wrong = partial(UserError, "is wrong", code=Code.INVALID_VALUE)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (wrong(), "is wrong."),
        (wrong(key="adapter.rank"), "adapter.rank: is wrong."),
        (wrong(key="adapter.rank", value=0), "adapter.rank=0: is wrong."),
        (wrong(key="a", value=""), "a=: is wrong."),
        (wrong(key="a", value=0, remedy="Give 1."), "a=0: is wrong. Give 1."),
        (wrong(file="train.tsv", row=17), "train.tsv, row 17: is wrong."),
        (wrong(file=Path("train.tsv"), remedy="Mend it."), "train.tsv: is wrong. Mend it."),
        (wrong(key="data.path", value="x", file="x/train.tsv"), "data.path=x: x/train.tsv: is wrong."),
    ],
)
def test_says_where_what_and_the_remedy(error: UserError, text: str) -> None:
    assert str(error) == text


def test_moves_below_a_group() -> None:
    error = wrong(key="rank", value=0)
    assert error.under("adapter") is error
    assert str(error) == "adapter.rank=0: is wrong."
    assert str(wrong().under("adapter")) == "is wrong."
    assert error.under("").key == "adapter.rank"


@given(st.text(), st.text(), st.text(min_size=1), st.text())
def test_is_always_one_line(reason: str, key: str, value: str, remedy: str) -> None:
    assert len(str(UserError(reason, code=Code.INVALID_VALUE, key=key, value=value, remedy=remedy)).splitlines()) <= 1


def test_nearest_by_the_whole_or_by_the_last_part() -> None:
    choices = ["adapter.rank", "adapter.alpha", "optimizer.lr"]
    assert nearest("adapter.rnak", choices) == "Did you mean adapter.rank?"
    assert nearest("alpah", choices) == "Did you mean adapter.alpha?"
    assert nearest("zzz", choices) == "Choices: adapter.alpha, adapter.rank, optimizer.lr."
    assert nearest("zzz", []) == ""


@given(st.text(max_size=20), st.lists(st.text(max_size=20), max_size=5))
def test_nearest_names_only_what_is_known(word: str, choices: list[str]) -> None:
    hint = nearest(word, choices)
    if hint.startswith("Did you mean "):
        assert hint.removeprefix("Did you mean ").removesuffix("?") in choices
    elif choices:
        assert hint == f"Choices: {', '.join(sorted(set(choices)))}."
    else:
        assert hint == ""
