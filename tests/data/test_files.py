"""The readers give exactly what a file holds, or refuse it naming file and row."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_bench.data.examples import Examples
from lora_bench.data.files import READERS, read
from lora_bench.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

QUESTIONS = ("question1", "question2")
HEADER = "question1\tquestion2\tlabel\n"
per_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def refusal(path: Path, columns: tuple[str, ...] = QUESTIONS, label: str | None = "label", **more: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, columns, label, **more)
    assert caught.value.file == str(path)
    assert "\n" not in str(caught.value)
    return caught.value


def rows_of(examples: Examples) -> list[tuple[str, ...]]:
    return list(zip(*examples.texts, strict=True))


def test_all_formats_give_the_same_examples(tmp_path: Path) -> None:
    first, second, labels = ["Why?", 'a "b", c', "Grüße\u2028"], ["Why not?", "NA", ""], [0, 1, 1]
    rows = list(zip(first, second, labels, strict=True))
    files = [
        write(tmp_path / "a.tsv", HEADER + "".join(f"{a}\t{b}\t{label}\n" for a, b, label in rows)),
        write(
            tmp_path / "a.csv",
            "label,question2,question1\r\n"
            + "".join('{},"{}","{}"\r\n'.format(n, b, a.replace('"', '""')) for a, b, n in rows),
        ),
        write(
            tmp_path / "a.jsonl",
            "".join(json.dumps({"question1": a, "question2": b, "label": n, "more": None}) + "\n" for a, b, n in rows),
        ),
        write_parquet(tmp_path / "a.parquet", question1=first, question2=second, label=labels),
        write_parquet(tmp_path / "b.parquet", label=["0", "1", "1"], question2=second, question1=first),
    ]
    for path in files:
        found = read(path, QUESTIONS, "label")
        assert found.texts == (first, second), path
        assert found.labels is not None
        assert (found.labels.dtype, found.labels.tolist(), found.ids.tolist()) == (np.int64, labels, [0, 1, 2])


# --- TSV: tabs and line feeds mean something, nothing else does ---

plain_text = st.text(st.characters(exclude_characters="\t\n\0", exclude_categories=("Cs",)))
plain_rows = st.lists(st.tuples(plain_text, plain_text, st.sampled_from([0, 1])), min_size=1)


@given(plain_rows, st.sampled_from(["\n", "\r\n"]))
@example([('"', "NA", 1), ("\u2028\x0b\x0c\x1c\x85\r", "null", 0)], "\r\n")
@per_example
def test_any_text_survives_tsv(tmp_path: Path, rows: list[tuple[str, str, int]], end: str) -> None:
    lines = ["question1\tquestion2\tlabel", *(f"{a}\t{b}\t{label}" for a, b, label in rows)]
    found = read(write(tmp_path / "a.tsv", end.join(lines) + end), QUESTIONS, "label")
    assert rows_of(found) == [(a, b) for a, b, _ in rows]
    assert found.labels is not None
    assert found.labels.tolist() == [label for *_, label in rows]


def test_byte_order_mark_and_a_last_line_without_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "\ufeff" + HEADER + "\ufeffa\tb\t1")
    assert rows_of(read(path, QUESTIONS, "label")) == [("\ufeffa", "b")]


def test_standard_input_is_tsv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("text\nWhy\r\n\nÜ".encode())))
    assert read("-", ["text"], None).texts == (["Why", "", "Ü"],)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text\n\xff")))
    with pytest.raises(UserError, match="standard input, row 2: is not UTF-8"):
        read("-", ["text"], None)


def test_without_a_label_column_labels_are_not_looked_at(tmp_path: Path) -> None:
    found = read(write(tmp_path / "a.tsv", HEADER + "a\tb\tmaybe\n"), QUESTIONS, None)
    assert (rows_of(found), found.labels) == ([("a", "b")], None)


@pytest.mark.parametrize(
    ("content", "row", "says"),
    [
        ("", None, "is empty"),
        (b"\xef\xbb\xbf", None, "is empty"),
        (HEADER, None, "has a header but no rows"),
        (HEADER + "a\tb\t1\na\tb\n", 3, "2 columns where the header has 3"),
        (HEADER + "a\tb\t1\t\n", 2, "4 columns where the header has 3"),
        (HEADER + "a\tb\t1\n\na\tb\t1\n", 3, "1 column where the header has 3"),
        (HEADER + "a\tb\t1\n\n", 3, "1 column where"),
        (HEADER.encode() + b"a\tb\t1\na\xff\tb\t1\n", 3, "is not UTF-8"),
        (HEADER.encode("utf-16"), 1, ""),
        (HEADER + "a\tb\t1\na\0\tb\t1\n", 3, "NUL"),
        ("label\tquestion1\tquestion2\tlabel\n1\ta\tb\t1\n", 1, "two columns named 'label'"),
        ("question1\tquestion_2\tlabel\na\tb\t1\n", None, "Did you mean question_2?"),
        ("question1\tquestion2\tLabel\na\tb\t1\n", None, "['question1', 'question2', 'Label']"),
        ("question1\tquestion2\tlabel\x1b[31m\na\tb\t1\n", None, "label\\x1b[31m"),
    ],
)
def test_wrong_tsv_is_refused(tmp_path: Path, content: str | bytes, row: int | None, says: str) -> None:
    error = refusal(write(tmp_path / "a.tsv", content))
    assert error.row == row
    assert says in str(error)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "1.0", "", " 1", "true", "NA", "０", "1" * 5000])
def test_labels_are_0_or_1(tmp_path: Path, label: str) -> None:
    error = refusal(write(tmp_path / "a.tsv", HEADER + f"a\tb\t1\na\tb\t{label}\n"))
    assert error.row == 3
    assert label[:10] in str(error)
    assert "data.label_column=label" in str(error)
    assert len(str(error)) < 400


def test_hidden_labels_of_a_test_split(tmp_path: Path) -> None:
    hidden = write(tmp_path / "a.tsv", HEADER + "a\tb\t-1\na\tb\t-1\n")
    absent = write(tmp_path / "b.tsv", "question1\tquestion2\na\tb\n")
    mixed = write(tmp_path / "c.tsv", HEADER + "a\tb\t1\na\tb\t-1\n")
    for path in (hidden, absent):
        assert read(path, QUESTIONS, "label", labels_may_hide=True).labels is None
        refusal(path)
    assert refusal(mixed, labels_may_hide=True).row == 3


# --- CSV ---

any_text = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))


@given(st.lists(st.tuples(any_text, any_text), min_size=1))
@per_example
def test_any_text_survives_quoted_csv(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    quoted = ['"{}","{}"'.format(*(text.replace('"', '""') for text in row)) for row in rows]
    path = write(tmp_path / "a.csv", "\n".join(["question1,question2", *quoted]))
    assert rows_of(read(path, QUESTIONS, None)) == rows


@pytest.mark.parametrize(
    ("body", "row", "says"),
    [
        ('a,b,1\n"a,b,1\na,b,0\n', 3, "unbalanced quotes"),
        ('"two\nlines",b,1\na "quote,b,1\n', 4, "unbalanced quotes"),
        ('"a"x,b,1\n', 2, "is not valid CSV"),
        ("a,b,1\n\na,b,1\n", 3, "0 columns where the header has 3"),
        ('"two\nlines",b,1\na,b\n', 4, "2 columns where the header has 3"),
        ('"two\nlines",b,1\na,b,x\n', 4, "'x' is neither 0 nor 1"),
        ("a\rb,c,1\n", 2, "is not valid CSV"),
    ],
)
def test_wrong_csv_is_refused(tmp_path: Path, body: str, row: int, says: str) -> None:
    error = refusal(write(tmp_path / "a.csv", "question1,question2,label\n" + body))
    assert (error.row, says in str(error)) == (row, True), str(error)


# --- JSONL and Parquet ---

GOOD = '{"question1": "a", "question2": "b", "label": 1}\n'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "is not valid JSON: Expecting value at character 1"),
        ('{"question1": ', "is not valid JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"question1": "a", "label": 1}', "has no 'question2'"),
        ('{"question1": "a", "question2": null, "label": 1}', "'question2' is None, not a text"),
        ('{"question1": 3, "question2": "b", "label": 1}', "'question1' is 3, not a text"),
        ('{"question1": "\\ud800", "question2": "b", "label": 1}', "half of a surrogate pair"),
        ('{"question1": "a", "question1": "c", "question2": "b", "label": 1}', "a key is given twice"),
        ('{"question1": "a", "question2": "b", "label": true}', "True is neither 0 nor 1"),
        ('{"question1": "a", "question2": "b", "label": 1.0}', "1.0 is neither 0 nor 1"),
        ('{"question1": "a", "question2": "b", "label": [1]}', "[1] is neither 0 nor 1"),
        ('{"question1": "a", "question2": "b", "label": null}', "None is neither 0 nor 1"),
        ('{"question1": "a", "question2": "b"}', "has no 'label'"),
    ],
)
def test_wrong_jsonl_is_refused(tmp_path: Path, line: str, says: str) -> None:
    error = refusal(write(tmp_path / "a.jsonl", GOOD + line + "\n" + GOOD))
    assert (error.row, says in str(error)) == (2, True), str(error)


def test_wrong_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert "is not valid Parquet" in str(refusal(write(path, "PAR1 and nothing more")))
    assert refusal(write_parquet(path, question1=["a", None], question2=["b", "b"], label=[0, 1])).row == 2
    assert refusal(write_parquet(path, question1=["a"], question2=[3], label=[0])).row == 1
    for label in (True, 1.0, 2, None):
        assert refusal(write_parquet(path, question1=["a"] * 2, question2=["b"] * 2, label=[label] * 2)).row == 1
    assert "no rows" in str(refusal(write_parquet(path, question1=pa.array([], pa.string()))))
    spoiled = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], "<i4").tobytes()), pa.py_buffer(b"\xff"))
    assert "'question1' cannot be read" in str(refusal(write_parquet(path, question1=spoiled, question2=["b"])))


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in str(refusal(tmp_path / "absent.tsv"))
    (tmp_path / "folder.tsv").mkdir()
    assert "cannot be read" in str(refusal(tmp_path / "folder.tsv"))
    assert ".tsv, .csv, .jsonl, .parquet" in str(refusal(write(tmp_path / "a.tsv.gz", b"\x1f\x8b")))


# --- whatever a file holds ---


def outcome(path: Path) -> Examples | UserError:
    try:
        return read(path, ("a", "b"), None)
    except UserError as error:
        return error


@pytest.mark.parametrize("kind", READERS)
@given(content=st.binary() | st.text('ab,\t\n\r"{}[]:01\0\ufeff').map(str.encode), as_body=st.booleans())
@per_example
def test_random_bytes_are_read_or_refused(tmp_path: Path, kind: str, content: bytes, as_body: bool) -> None:
    header = {".tsv": b"a\tb\n", ".csv": b"a,b\n", ".jsonl": b'{"a":"","b":""}\n', ".parquet": b"PAR1"}[kind]
    found = outcome(write(tmp_path / f"a{kind}", header + content if as_body else content))
    if isinstance(found, Examples):
        assert len(found) == len(found.texts[0]) == len(found.texts[1]) > 0
    else:
        assert str(tmp_path) in str(found)


@given(place=st.integers(min_value=0), byte=st.integers(0, 255))
@per_example
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path: Path, place: int, byte: int) -> None:
    raw = bytearray(write_parquet(tmp_path / "whole.parquet", a=["Why?", "How?"], b=["x", "y"]).read_bytes())
    raw[place % len(raw)] = byte
    found = outcome(write(tmp_path / "a.parquet", bytes(raw)))
    assert isinstance(found, Examples) or str(tmp_path) in str(found)
