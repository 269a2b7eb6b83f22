"""Input columns are written unchanged in every format, with predictions as additional columns."""

from __future__ import annotations

import datetime
import json
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pandas
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_bench.data.labelled import FORMATS, check_texts, encode, unique_column_names
from lora_bench.data.readers import read_table
from lora_bench.errors import Code, UserError
from tests.command_line import refuses

if TYPE_CHECKING:
    from pathlib import Path

PREDICTIONS = {"label": [1], "score": [0.1234567890123456]}
few = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
odd = "a\rb\n\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\0\"',\t; "


def write_predictions(folder: Path, source: Path, suffix: str, **predictions: Any) -> tuple[Path, int]:
    table = read_table(source)
    content, replaced_texts = encode(
        table, predictions or {k: v * len(table.rows) for k, v in PREDICTIONS.items()}, suffix
    )
    (folder / f"out{suffix}").write_bytes(content)
    return folder / f"out{suffix}", replaced_texts


def jsonl(folder: Path, *rows: Any) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "in.jsonl"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@example([(odd, " "), ("", "\r"), ("NA", "null"), ("\ufeff", "=1+1")])
@few
def test_any_text_is_written_and_read_unchanged(tmp_path: Path, suffix: str, rows: list[tuple[str, str]]) -> None:
    source = jsonl(tmp_path, *({"a": a, "b": b} for a, b in rows))
    out, replaced = write_predictions(tmp_path, source, suffix)
    assert replaced == 0
    table = read_table(out)
    assert list(zip(table.column("a"), table.column("b"), strict=True)) == rows
    assert list(table.names) == ["a", "b", "label", "score"]
    copied = tmp_path / f"again{suffix}"
    copied.write_bytes(out.read_bytes())
    table = read_table(write_predictions(tmp_path, copied, ".jsonl", third=[0] * len(rows))[0])
    assert list(zip(table.column("a"), table.column("b"), strict=True)) == rows


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@example([(odd, " "), ("", "\r")])
@few
def test_pandas_reads_the_csv_unchanged(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    out, _ = write_predictions(tmp_path, jsonl(tmp_path, *({"a": a, "b": b} for a, b in rows)), ".csv")
    frame = pandas.read_csv(out, keep_default_na=False, dtype={"a": str, "b": str})
    assert list(zip(frame["a"], frame["b"], strict=True)) == rows
    assert frame["label"].tolist() == [1] * len(rows)
    assert frame["score"].tolist() == PREDICTIONS["score"] * len(rows)


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
@example([(odd, " "), ("", "\r")])
@few
def test_tsv_counts_the_texts_that_it_changes(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    out, replaced = write_predictions(tmp_path, jsonl(tmp_path, *({"a": a, "b": b} for a, b in rows)), ".tsv")
    table = read_table(out)
    rows_read = list(zip(table.column("a"), table.column("b"), strict=True))
    assert len(rows_read) == len(rows)
    changed = [
        (x, y)
        for row, text_read in zip(rows, rows_read, strict=True)
        for x, y in zip(row, text_read, strict=True)
        if x != y
    ]
    assert replaced == len(changed)
    for text, text_read in changed:
        assert len(text) == len(text_read)
        assert {x for x, y in zip(text, text_read, strict=True) if x != y} <= set("\t\r\n\0")


def test_jsonl_rows_keep_their_keys_and_values(tmp_path: Path) -> None:
    rows = [
        {"a": "x", "gold": [1, {"deep": None}], "n": 12345678901234567890123, "half": "\ud800"},
        {"label": True, "a": "y", "f": 0.1},
    ]
    out, _ = write_predictions(tmp_path, jsonl(tmp_path, *rows), ".jsonl", predicted=[0, 1])
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        row | {"predicted": i} for i, row in enumerate(rows)
    ]


def test_values_other_than_texts_are_json_in_csv_and_tsv(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": [1, "é"], "c": None, "d": True, "e": 1.5}, {"a": "y", "b": {"k": 1}}]
    source = jsonl(tmp_path, *rows)
    for suffix in (".csv", ".tsv"):
        table = read_table(write_predictions(tmp_path, source, suffix)[0])
        assert [json.loads(cell) for cell in table.column("b")] == [[1, "é"], {"k": 1}]
        assert [list(table.column(name)) for name in "cde"] == [["", ""], ["true", ""], ["1.5", ""]]


def test_parquet_columns_keep_their_types(tmp_path: Path) -> None:
    columns = {
        "a": pa.array(["x", "y"]),
        "words": pa.array(["u", "u"]).dictionary_encode(),
        "when": pa.array([1, None], pa.timestamp("ns")),
        "nested": pa.array([[{"k": 1}], []]),
        "small": pa.array([1, 2], pa.int8()),
    }
    source = tmp_path / "in.parquet"
    parquet.write_table(pa.table(columns), source)
    out = parquet.read_table(write_predictions(tmp_path, source, ".parquet")[0])
    assert out.select(list(columns)).equals(parquet.read_table(source))
    assert out.column_names[-2:] == ["label", "score"]


def test_parquet_values_are_converted_to_text(tmp_path: Path) -> None:
    columns = {
        "a": ["x"],
        "day": [datetime.date(2020, 2, 29)],
        "money": [Decimal("1.10")],
        "raw": [b"\xff\x00"],
        "nested": [{"day": datetime.date(2020, 2, 29)}],
    }
    source = tmp_path / "in.parquet"
    parquet.write_table(pa.table(columns), source)
    expected = ["x", "2020-02-29", "1.10", "ff00"]
    for suffix in (".csv", ".tsv", ".jsonl"):
        table = read_table(write_predictions(tmp_path, source, suffix)[0])
        assert [table.column(name)[0] for name in list(columns)[:-1]] == expected


def test_numbers_of_parquet_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    columns = {"a": ["x", "y"], "number": [math.nan, 1.5], "nested": [[{"k": math.inf}], [{"k": 2.0}]]}
    parquet.write_table(pa.table(columns), source)
    lines = write_predictions(tmp_path, source, ".jsonl")[0].read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [(row["number"], row["nested"]) for row in rows] == [(None, [{"k": None}]), (1.5, [{"k": 2.0}])]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None], [1, None]),
        ([1, 2**64], ["1", str(2**64)]),
        ([1, "1"], ["1", "1"]),
        ([{}, [1]], ["{}", "[1]"]),
        ([True, 1], ["true", "1"]),
        ([None, None], [None, None]),
    ],
)
def test_jsonl_values_of_several_types_become_one_parquet_type(
    tmp_path: Path, values: list[Any], expected: list[Any]
) -> None:
    out, _ = write_predictions(tmp_path, jsonl(tmp_path, *({"a": value} for value in values)), ".parquet")
    assert parquet.read_table(out).column("a").to_pylist() == expected


def test_lone_surrogates_are_refused_in_formats_other_than_jsonl(tmp_path: Path) -> None:
    table = read_table(jsonl(tmp_path, {"a": "x"}, {"a": "\ud800"}))
    check_texts(table, ".jsonl")
    for suffix in set(FORMATS) - {".jsonl"}:
        with refuses(Code.INVALID_DATA) as caught:
            check_texts(table, suffix)
        assert (caught.value.file, caught.value.row) == (table.source, 2)
        assert "'a'" in caught.value.reason
        assert ".jsonl" in str(caught.value.remedy)


def test_prediction_columns_get_unused_names() -> None:
    assert unique_column_names(["label", "score"], ["a"]) == {"label": "label", "score": "score"}
    assert unique_column_names(["label", "score"], ["label"]) == {"label": "predicted_label", "score": "score"}
    taken = ["label", "predicted_label", "score"]
    assert unique_column_names(["label", "score"], taken) == {"label": "predicted_label_2", "score": "predicted_score"}


@pytest.mark.parametrize("suffix", FORMATS)
@given(content=st.binary() | st.text('ab,\t\n\r"{}[]:01\0\ufeff\\').map(str.encode), as_body=st.booleans())
@example(content=b"{}", as_body=False)
@few
def test_any_readable_table_is_written_in_every_format(
    tmp_path: Path, suffix: str, content: bytes, as_body: bool
) -> None:
    header = {".tsv": b"a\tb\n", ".csv": b"a,b\n", ".jsonl": b'{"a":"","b":""}\n', ".parquet": b"PAR1"}[suffix]
    (tmp_path / f"in{suffix}").write_bytes(header + content if as_body else content)
    try:
        table = read_table(tmp_path / f"in{suffix}")
    except UserError:
        return
    for output in FORMATS:
        try:
            check_texts(table, output)
        except UserError:
            continue
        column = unique_column_names(["label"], table.names)["label"]
        encoded, _ = encode(table, {column: [0] * len(table.rows)}, output)
        assert len(table.rows) == 0 or encoded
