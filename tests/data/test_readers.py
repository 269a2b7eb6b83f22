"""Readers return exactly the content of a file, or refuse it with its name and row."""

from __future__ import annotations

import io
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lora_bench.data.examples import Examples
from lora_bench.data.labels import ClassLabels
from lora_bench.data.readers import READERS, find_split_files, read, read_table
from lora_bench.errors import Code, UserError
from tests.command_line import refuses

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


def refusal(
    path: Path,
    columns: tuple[str, ...] = QUESTIONS,
    label: str | None = "label",
    code: Code = Code.INVALID_DATA,
    **options: Any,
) -> UserError:
    with refuses(code) as caught:
        read(path, columns, label, **options)
    assert caught.value.file == str(path)
    assert "\n" not in str(caught.value)
    return caught.value


def has_data(error: UserError, data: str) -> bool:
    """Return whether the reason or the remedy of an error has every word of `data`; the file's path does not count."""
    text = f"{error.reason} {error.remedy}"
    return all(datum in text for datum in data.split())


def rows_of(examples: Examples) -> list[tuple[str, ...]]:
    return list(zip(*examples.texts, strict=True))


def test_all_formats_are_read_as_the_same_examples(tmp_path: Path) -> None:
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
        examples = read(path, QUESTIONS, "label")
        assert examples.texts == (first, second), path
        assert examples.labels is not None
        assert (examples.labels.dtype, examples.labels.tolist(), examples.ids.tolist()) == (np.int64, labels, [0, 1, 2])


# --- TSV: only tabs and line feeds are special ---

plain_text = st.text(st.characters(exclude_characters="\t\n\0", exclude_categories=("Cs",)))
plain_rows = st.lists(st.tuples(plain_text, plain_text, st.sampled_from([0, 1])), min_size=1)


@given(plain_rows, st.sampled_from(["\n", "\r\n"]))
@example([('"', "NA", 1), ("\u2028\x0b\x0c\x1c\x85\r", "null", 0)], "\r\n")
@per_example
def test_any_text_is_read_from_tsv_unchanged(tmp_path: Path, rows: list[tuple[str, str, int]], end: str) -> None:
    lines = ["question1\tquestion2\tlabel", *(f"{a}\t{b}\t{label}" for a, b, label in rows)]
    examples = read(write(tmp_path / "a.tsv", end.join(lines) + end), QUESTIONS, "label")
    assert rows_of(examples) == [(a, b) for a, b, _ in rows]
    assert examples.labels is not None
    assert examples.labels.tolist() == [label for *_, label in rows]


def test_byte_order_mark_and_missing_final_newline_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "\ufeff" + HEADER + "\ufeffa\tb\t1")
    assert rows_of(read(path, QUESTIONS, "label")) == [("\ufeffa", "b")]


def test_standard_input_is_read_as_tsv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("text\nWhy\r\n\nÜ".encode())))
    assert read("-", ["text"], None).texts == (["Why", "", "Ü"],)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text\n\xff")))
    with refuses(Code.INVALID_DATA) as caught:
        read("-", ["text"], None)
    assert (caught.value.file, caught.value.row) == ("standard input", 2)
    assert "UTF-8" in caught.value.reason


def test_without_a_label_column_labels_are_not_read(tmp_path: Path) -> None:
    examples = read(write(tmp_path / "a.tsv", HEADER + "a\tb\tmaybe\n"), QUESTIONS, None)
    assert (rows_of(examples), examples.labels) == ([("a", "b")], None)


@pytest.mark.parametrize(
    ("content", "row", "data"),
    [
        (HEADER + "a\tb\t1\na\tb\n", 3, "2 3"),
        (HEADER + "a\tb\t1\t\n", 2, "4 3"),
        (HEADER + "a\tb\t1\n\na\tb\t1\n", 3, "blank"),
        (HEADER + "a\tb\t1\n  \na\tb\t1\n", 3, "blank"),
        ("\n" + HEADER + "a\tb\t1\n", 2, "3 1"),
        (HEADER + "a\tb\t1\n\na\tb\t1\rc\td\t0\r", 3, "blank"),
        (HEADER + "a\tb\t1\rc\td\t0\r", 2, "5 3 carriage"),
        ((HEADER + "a\tb\t1\n").replace("\n", "\r"), None, "carriage"),
        (HEADER.encode() + b"a\tb\t1\na\xff\tb\t1\n", 3, "UTF-8"),
        (HEADER.encode("utf-16"), 1, "UTF-16"),
        (b"\xfe\xff" + HEADER.encode("utf-16-be"), 1, "UTF-16"),
        (HEADER.encode("utf-32"), 1, "UTF-32"),
        (HEADER.encode("utf-16-le"), 1, "NUL"),
        (HEADER + "a\tb\t1\na\0\tb\t1\n", 3, "NUL"),
        ("label\tquestion1\tquestion2\tlabel\n1\ta\tb\t1\n", 1, "'label'"),
        ("question1\tquestion_2\tlabel\na\tb\t1\n", None, "question_2?"),
        ("question1\tquestion2\tLabel\na\tb\t1\n", None, "'question1' 'question2' 'Label'"),
        ("question1\tquestion2\tlabel\x1b[31m\na\tb\t1\n", None, "label\\x1b[31m"),
    ],
)
def test_invalid_tsv_is_refused(tmp_path: Path, content: str | bytes, row: int | None, data: str) -> None:
    error = refusal(write(tmp_path / "a.tsv", content))
    assert error.row == row
    assert has_data(error, data)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("content", ["", b"\xef\xbb\xbf", "\n\r\n", HEADER, HEADER + "\r\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str | bytes) -> None:
    assert refusal(write(tmp_path / "a.tsv", content), code=Code.EMPTY).row is None


@pytest.mark.parametrize("label", ["2", "-1", "0.5", "1.0", "", " 1", "true", "NA", "０", "1" * 5000])
def test_labels_other_than_0_and_1_are_refused(tmp_path: Path, label: str) -> None:
    error = refusal(write(tmp_path / "a.tsv", HEADER + f"a\tb\t1\na\tb\t{label}\n"))
    assert error.row == 3
    assert label[:10] in str(error)
    assert "data.label_column=label" in str(error)
    assert len(str(error)) < 400


def test_hidden_labels_are_accepted_in_a_test_split_only(tmp_path: Path) -> None:
    hidden = write(tmp_path / "a.tsv", HEADER + "a\tb\t-1\na\tb\t-1\n")
    absent = write(tmp_path / "b.tsv", "question1\tquestion2\na\tb\n")
    mixed = write(tmp_path / "c.tsv", HEADER + "a\tb\t1\na\tb\t-1\n")
    for path in (hidden, absent):
        assert read(path, QUESTIONS, "label", labels_may_hide=True).labels is None
        refusal(path)
    assert refusal(mixed, labels_may_hide=True).row == 3


# --- CSV ---

any_text = st.text(st.characters(exclude_categories=("Cs",)))


@given(st.lists(st.tuples(any_text, any_text), min_size=1))
@example([("a\0\rb", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029 ")])
@per_example
def test_any_text_is_read_from_quoted_csv_unchanged(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    quoted = ['"{}","{}"'.format(*(text.replace('"', '""') for text in row)) for row in rows]
    path = write(tmp_path / "a.csv", "\n".join(["question1,question2", *quoted]))
    assert rows_of(read(path, QUESTIONS, None)) == rows


@pytest.mark.parametrize(
    ("body", "row", "data"),
    [
        ('a,b,1\n"a,b,1\na,b,0\n', 3, "CSV quotes"),
        ('"two\nlines",b,1\na "quote,b,1\n', 4, "CSV quotes"),
        ('"a"x,b,1\n', 2, "CSV"),
        ("a,b,1\n\na,b,1\n", 3, "blank"),
        ('"two\nlines",b,1\na,b\n', 4, "2 3"),
        ('"two\nlines",b,1\na,b,x\n', 4, "'x'"),
        ("a\rb,c,1\n", 2, "CSV carriage"),
        ('"a\0b",c,1\na\0b,c,1\n', 3, "NUL"),
        ('"two\n\0lines",c,1\n\0', 4, "NUL"),
    ],
)
def test_invalid_csv_is_refused(tmp_path: Path, body: str, row: int, data: str) -> None:
    error = refusal(write(tmp_path / "a.csv", "question1,question2,label\n" + body))
    assert (error.row, has_data(error, data)) == (row, True), str(error)


# --- JSONL and Parquet ---

GOOD = '{"question1": "a", "question2": "b", "label": 1}\n'


@pytest.mark.parametrize(
    ("line", "data"),
    [
        ("", "blank"),
        (" \t\r", "blank"),
        ('{"question1": "a", "question2": "b", "label": %s}' % ("9" * 5000), "5,000"),
        ('{"question1": "a", "question2": "b", "label": NaN}', "JSON NaN null"),
        ('{"question1": "a", "question2": "b", "label": 1, "n": [-Infinity]}', "JSON -Infinity"),
        ('{"question1": "a", "question2": "b", "label": 1e999}', "JSON 1e999"),
        ('{"question1": ', "JSON"),
        ("[1]", "JSON [1]"),
        ("[" * 100_000, "JSON"),
        ('{"question1": "a", "label": 1}', "'question2'"),
        ('{"question1": "a", "question2": null, "label": 1}', "'question2' None"),
        ('{"question1": 3, "question2": "b", "label": 1}', "'question1' 3"),
        ('{"question1": "\\ud800", "question2": "b", "label": 1}', "'question1' surrogate"),
        ('{"question1": "a", "question1": "c", "question2": "b", "label": 1}', "JSON twice"),
        ('{"question1": "a", "question2": "b", "label": true}', "label True"),
        ('{"question1": "a", "question2": "b", "label": 1.0}', "label 1.0"),
        ('{"question1": "a", "question2": "b", "label": [1]}', "label [1]"),
        ('{"question1": "a", "question2": "b", "label": null}', "label None"),
        ('{"question1": "a", "question2": "b"}', "'label'"),
    ],
)
def test_invalid_jsonl_is_refused(tmp_path: Path, line: str, data: str) -> None:
    error = refusal(write(tmp_path / "a.jsonl", GOOD + line + "\n" + GOOD))
    assert (error.row, has_data(error, data)) == (2, True), str(error)


def test_invalid_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    refusal(write(path, "PAR1 and nothing more"), code=Code.DAMAGED)
    assert refusal(write_parquet(path, question1=["a", None], question2=["b", "b"], label=[0, 1])).row == 2
    assert refusal(write_parquet(path, question1=["a"], question2=[3], label=[0])).row == 1
    for label in (True, 1.0, 2, None):
        assert refusal(write_parquet(path, question1=["a"] * 2, question2=["b"] * 2, label=[label] * 2)).row == 1
    refusal(write_parquet(path, question1=pa.array([], pa.string())), code=Code.EMPTY)
    invalid_utf8 = pa.StringArray.from_buffers(
        1, pa.py_buffer(np.array([0, 1], "<i4").tobytes()), pa.py_buffer(b"\xff")
    )
    error = refusal(write_parquet(path, question1=invalid_utf8, question2=["b"]), code=Code.DAMAGED)
    assert "'question1'" in error.reason


def test_missing_files_folders_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "absent.tsv", code=Code.NOT_FOUND)
    (tmp_path / "folder.tsv").mkdir()
    refusal(tmp_path / "folder.tsv", code=Code.NOT_A_FILE)
    error = refusal(write(tmp_path / "a.tsv.gz", b"\x1f\x8b"), code=Code.UNKNOWN_CHOICE)
    assert ".tsv, .csv, .jsonl, .parquet" in error.reason


def test_a_split_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    for name in ("train.tsv", "test.tsv"):
        write(tmp_path / name, HEADER + "a\tb\t1\n")
    validation = tmp_path / "validation.tsv"
    validation.symlink_to("test.tsv")
    assert find_split_files(str(tmp_path))["validation"] == str(validation)
    validation.unlink()
    for make in (lambda: validation.symlink_to("absent.tsv"), validation.mkdir, lambda: os.mkfifo(validation)):
        make()
        with refuses(Code.NOT_A_FILE) as caught:
            find_split_files(str(tmp_path))
        assert caught.value.file == str(validation)
        (validation.rmdir if validation.is_dir() else validation.unlink)()


# --- arbitrary content ---


def read_or_error(path: Path) -> Examples | UserError:
    try:
        return read(path, ("a", "b"), None)
    except UserError as error:
        return error


@pytest.mark.parametrize("suffix", READERS)
@given(content=st.binary() | st.text('ab,\t\n\r"{}[]:01\0\ufeff').map(str.encode), as_body=st.booleans())
@per_example
def test_random_bytes_are_read_or_refused(tmp_path: Path, suffix: str, content: bytes, as_body: bool) -> None:
    header = {".tsv": b"a\tb\n", ".csv": b"a,b\n", ".jsonl": b'{"a":"","b":""}\n', ".parquet": b"PAR1"}[suffix]
    result = read_or_error(write(tmp_path / f"a{suffix}", header + content if as_body else content))
    if isinstance(result, Examples):
        assert len(result) == len(result.texts[0]) == len(result.texts[1]) > 0
    else:
        assert str(tmp_path) in str(result)


@given(position=st.integers(min_value=0), byte=st.integers(0, 255))
@per_example
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path: Path, position: int, byte: int) -> None:
    raw = bytearray(write_parquet(tmp_path / "whole.parquet", a=["Why?", "How?"], b=["x", "y"]).read_bytes())
    raw[position % len(raw)] = byte
    result = read_or_error(write(tmp_path / "a.parquet", bytes(raw)))
    assert isinstance(result, Examples) or str(tmp_path) in str(result)


# --- long fields, many columns, blank lines, devices and pipes ---

TEXT_SUFFIXES = (".tsv", ".csv", ".jsonl")


def as_text(suffix: str, rows: list[dict[str, str]], end: str = "\n") -> str:
    """Return the content of a file of this format; the values need no quoting."""
    if suffix == ".jsonl":
        return end.join(map(json.dumps, rows)) + end
    separator = {".tsv": "\t", ".csv": ","}[suffix]
    return end.join([separator.join(rows[0]), *(separator.join(row.values()) for row in rows)]) + end


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_a_field_may_be_of_any_length(tmp_path: Path, suffix: str) -> None:
    long = "word " * 100_000
    examples = read(write(tmp_path / f"a{suffix}", as_text(suffix, [{"a": long, "b": "x"}])), ("a", "b"), None)
    assert examples.texts == ([long], ["x"])


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_a_file_may_have_50_000_columns(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", as_text(suffix, [{str(i): f"v{i}" for i in range(50_000)}]))
    assert read(path, ("49999", "0"), None).texts == (["v49999"], ["v0"])


def test_a_duplicate_column_among_100_000_is_named(tmp_path: Path) -> None:
    names = [*map(str, range(100_000)), "99999"]
    path = write(tmp_path / "a.tsv", "\t".join(names) + "\n" + "\t".join(names) + "\n")
    error = refusal(path, ("1",), None)
    assert error.row == 1
    assert "'99999'" in error.reason


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "\n", "\n\n\n", "\r\n", "  \n", "\n  "])
@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path, suffix: str, tail: str, end: str) -> None:
    rows = [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    for content in (as_text(suffix, rows, end) + tail, as_text(suffix, rows, end).removesuffix(end)):
        assert read(write(tmp_path / f"a{suffix}", content), ("a", "b"), None).texts == (["1", "2"], ["x", "y"])


def test_blank_lines_of_a_single_text_column_are_empty_texts(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.tsv", "text\na\n\nb\n\n\n"), ("text",), None).texts == (["a", "", "b"],)
    assert read(write(tmp_path / "a.csv", 'text\na\n""\nb\n\n'), ("text",), None).texts == (["a", "", "b"],)
    assert refusal(write(tmp_path / "a.csv", "text\na\n\nb\n"), ("text",), None).row == 3


@pytest.mark.parametrize("suffix", TEXT_SUFFIXES)
def test_carriage_returns_as_line_ends_are_refused_with_the_remedy(tmp_path: Path, suffix: str) -> None:
    content = as_text(suffix, [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}], "\r")
    error = refusal(write(tmp_path / f"a{suffix}", content), ("a", "b"), None)
    assert error.row is None
    assert "tr '\\r' '\\n'" in str(error.remedy)


def test_class_names_are_those_of_the_file_or_its_values(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    datasets.Dataset.from_dict({"text": ["x", "y"], "label": [0, 1]}, features).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").class_names("label") == ["b", "a"]
    write_parquet(tmp_path / "b.parquet", text=["x", "y", "z"], label=["b", "a", "b"])
    table = read_table(tmp_path / "b.parquet")
    assert table.class_names("label") == ["a", "b"]
    labels = table.examples(["text"], "label", ClassLabels(["a", "b"]), labels_may_hide=False).labels
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
    write_parquet(tmp_path / "c.parquet", text=["x", "y"], label=["a", None])
    with refuses(Code.INVALID_DATA) as caught:
        read_table(tmp_path / "c.parquet").class_names("label")
    assert (caught.value.file, caught.value.row) == (str(tmp_path / "c.parquet"), 2)


def test_devices_circular_links_and_invalid_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "circle.tsv").symlink_to(tmp_path / "circle.tsv")
    (tmp_path / "zero.tsv").symlink_to("/dev/zero")
    refusal(tmp_path / "circle.tsv", code=Code.UNREADABLE)
    refusal(tmp_path / "zero.tsv", code=Code.NOT_A_FILE)
    for path, code in (("/dev/zero", Code.NOT_A_FILE), ("/dev/null", Code.EMPTY), ("a\0.tsv", Code.UNREADABLE)):
        with refuses(code) as caught:
            read(path, QUESTIONS, None)
        assert caught.value.file == path


def test_a_pipe_is_read_to_its_end_as_tsv(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=write, args=(tmp_path / "pipe", "a\tb\nx\ty\n"))
    writer.start()
    assert read(tmp_path / "pipe", ("a", "b"), None).texts == (["x"], ["y"])
    writer.join()


def test_parquet_columns_of_texts_are_read_and_other_types_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    dictionary = pa.array(["x", "y"]).dictionary_encode()
    assert read(write_parquet(path, a=dictionary, b=["u", "v"]), ("a", "b"), None).texts == (["x", "y"], ["u", "v"])
    large = pa.array(["x", "y"], pa.large_string())
    assert read(write_parquet(path, a=large, b=["u", "v"]), ("a", "b"), None).texts == (["x", "y"], ["u", "v"])
    nanoseconds = pa.array([1, 2], pa.timestamp("ns"))
    for column in ([["x"], ["y"]], [{"a": "x"}, {"a": "y"}], [b"x", b"y"], [1.5, None], nanoseconds, pa.nulls(2)):
        error = refusal(write_parquet(path, a=column, b=["u", "v"]), ("a", "b"), None)
        assert "'a'" in error.reason
    parquet.ParquetWriter(path, pa.schema({"a": pa.string(), "b": pa.string()})).close()  # without a row group
    refusal(path, ("a", "b"), None, Code.EMPTY)
    content = write_parquet(path, a=["x"], b=["y"]).read_bytes()
    for damaged in (content[:-5], bytes(len(content)), content[:-4] + b"PARE"):
        refusal(write(path, damaged), ("a", "b"), None, Code.DAMAGED)
