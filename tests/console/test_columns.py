"""Texts in columns: what is left out and shortened where the terminal is narrow."""

from __future__ import annotations

import pytest

from lora_bench.console.columns import TextColumn, lay_out

COLUMNS = [
    TextColumn("id", ["a", "b"]),
    TextColumn("name", ["first", "second"], min_width=3),
    TextColumn("model", ["minilm", "minilm"], min_width=5),
    TextColumn("data", ["pairs", "pairs"], min_width=4),
    TextColumn("mcc", ["0.5", "0.5"], is_number=True),
    TextColumn("overrides", ["seed=0", "seed=1"], min_width=4),
]


@pytest.mark.parametrize(
    ("width", "header", "row"),
    [
        (None, "id  name    model   data   mcc  overrides", "a   first   minilm  pairs  0.5  seed=0"),
        (40, "id  name    model   mcc  overrides", "a   first   minilm  0.5  seed=0"),
        (30, "id  name    mcc  overrides", "a   first   0.5  seed=0"),
        (18, "id  na…  mcc  ove…", "a   fi…  0.5  see…"),
        (12, "id  na…  mcc", "a   fi…  0.5"),
    ],
)
def test_columns_that_distinguish_no_rows_are_left_out_first(width: int | None, header: str, row: str) -> None:
    assert lay_out(COLUMNS, width)[:2] == [header, row]
