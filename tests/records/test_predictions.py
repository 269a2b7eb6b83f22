"""Predictions from a run's folder: used as they are, or refused with what is wrong with the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_bench.errors import Code
from lora_bench.records import predictions
from lora_bench.records.run_folder import Run
from tests.command_line import refuses

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = Path("predictions/test.parquet")
COLUMNS = {"id": [3, 1, 2], "label": [1, 0, None], "score": [0.9, 0.2, 0.5]}


def write(columns: dict[str, Any]) -> None:
    FILE.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), FILE)


def test_rows_with_a_label_come_by_id(in_tmp: Path) -> None:
    write(COLUMNS)
    stored = predictions.read(in_tmp, "test")
    assert (stored.ids.tolist(), stored.labels.tolist(), stored.scores.tolist()) == ([1, 3], [0, 1], [0.2, 0.9])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("score", [0.9, float("nan"), 0.5]),
        ("score", [0.9, 1.5, 0.5]),
        ("score", ["0.9", "0.1", "0.2"]),
        ("score", [{"a": 0.1}] * 3),
        ("score", [[0.1]] * 3),
        ("label", [1, 0, 2]),
        ("label", [1, 0, -1]),
        ("label", ["1", "0", "1"]),
        ("label", pa.array([None] * 3, pa.int64())),
        ("id", [1, 1, 2]),
        ("id", [0.5, 1.5, 2.5]),
    ],
)
def test_odd_columns_are_refused_by_name(in_tmp: Path, name: str, values: Any) -> None:
    write(COLUMNS | {name: values})
    with refuses(Code.DAMAGED) as caught:
        predictions.read(in_tmp, "test")
    assert caught.value.file == in_tmp / FILE
    assert name in caught.value.reason.split()
    assert predictions.read_if_usable(in_tmp, "test") is None


def test_columns_that_are_missing_or_there_twice(in_tmp: Path) -> None:
    write({"id": [1], "label": [1]})
    with refuses(Code.DAMAGED) as missing:
        predictions.read(in_tmp, "test")
    assert "column score" in str(missing.value)
    twice = pa.Table.from_arrays(
        [pa.array([1]), pa.array([1]), pa.array([0]), pa.array([0.5])], ["id", "label", "label", "score"]
    )
    pq.write_table(twice, FILE)
    with refuses(Code.DAMAGED) as ambiguous:
        predictions.read(in_tmp, "test")
    assert "column label" in str(ambiguous.value)


def test_more_rows_than_are_read(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MAX_ROWS", 2)
    write(COLUMNS)
    with refuses(Code.DAMAGED) as caught:
        predictions.read(in_tmp, "test")
    assert "3 rows" in str(caught.value)


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 * 2**30)


@pytest.mark.parametrize(
    ("make", "code", "datum"),
    [
        (os.mkfifo, Code.UNREADABLE, ""),
        (lambda path: path.symlink_to("/dev/zero"), Code.UNREADABLE, ""),
        (lambda path: path.symlink_to(path.name), Code.UNREADABLE, "symbolic links"),
        (Path.mkdir, Code.UNREADABLE, ""),
        (huge, Code.UNREADABLE, "10,737,418,240 bytes"),
        (lambda path: path.write_bytes(b"PAR1" + bytes(40) + b"PAR1"), Code.DAMAGED, ""),
        (lambda path: None, Code.NOT_FOUND, ""),
    ],
)
def test_what_is_no_file_of_predictions(in_tmp: Path, make: Callable[[Path], object], code: Code, datum: str) -> None:
    FILE.parent.mkdir()
    make(FILE)
    with refuses(code) as caught:
        predictions.read(in_tmp, "test")
    assert caught.value.file == in_tmp / FILE
    assert datum in str(caught.value)


@pytest.mark.parametrize("classes", [2, 3])
def test_no_bit_of_a_file_raises_anything_else(in_tmp: Path, classes: int) -> None:
    if classes == 2:
        write({"id": np.arange(50), "label": np.arange(50) % 2, "score": np.linspace(0, 1, 50)})
    else:
        FILE.parent.mkdir()
        FILE.write_bytes(predictions.encode(list(range(30)), [0, 1, 2] * 10, np.tile(THREE, (10, 1))))
    original = FILE.read_bytes()
    chance = np.random.default_rng(0)
    for position in chance.integers(0, len(original), 300):
        content = bytearray(original)
        content[position] ^= 1 << chance.integers(8)
        FILE.write_bytes(content)
        predictions.read_if_usable(in_tmp, "test")


def test_a_changed_score_is_noticed(tmp_path: Path) -> None:
    run = Run.claim(tmp_path / "run", choices={}, config={}, overrides=[])
    scores = [i / 1000 for i in range(1000)]
    run.write_predictions("validation", list(range(1000)), [0, 1] * 500, scores)
    path = run.folder / "predictions/validation.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with refuses(Code.DAMAGED) as caught:
        predictions.read(run.folder, "validation")
    assert caught.value.file == path


THREE = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.2, 0.6, 0.2]])


def written(labels: Any, scores: Any) -> predictions.Predictions:
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(predictions.encode([3, 1, 2], labels, scores))
    return predictions.read(Path(), "test")


def test_binary_files_keep_their_columns(in_tmp: Path) -> None:
    stored = written([1, None, 0], [0.9, 0.2, 0.5])
    schema = pq.read_schema(FILE)
    assert schema.names == ["id", "label", "score"]
    assert schema.types == [pa.int64(), pa.int64(), pa.float64()]
    assert (stored.form, stored.predicted.tolist(), stored.correct.tolist()) == ("binary", [True, True], [False, True])


def test_probabilities_of_three_classes(in_tmp: Path) -> None:
    stored = written([0, None, 2], THREE)
    assert pq.read_schema(FILE).types == [pa.int64(), pa.int64(), pa.list_(pa.float64(), 3)]
    assert (stored.form, stored.ids.tolist(), stored.labels.tolist()) == ("multiclass", [2, 3], [2, 0])
    assert stored.scores.tolist() == THREE[[2, 0]].tolist()
    assert stored.predicted.tolist() == [1, 0]
    assert stored.correct.tolist() == [False, True]
    assert stored.value("accuracy") == 0.5
    assert not stored.is_constant
    with pytest.raises(ValueError, match="f1"):
        stored.value("f1")


@pytest.mark.parametrize("labels", [[2.5, None, 1], np.array([2.5, np.nan, 1])])
def test_numbers(in_tmp: Path, labels: Any) -> None:
    stored = written(labels, [2.0, 9.0, -1.5])
    assert pq.read_schema(FILE).types == [pa.int64(), pa.float64(), pa.float64()]
    assert pq.read_table(FILE)["label"].null_count == 1
    assert (stored.form, stored.labels.tolist(), stored.predicted.tolist()) == ("regression", [1.0, 2.5], [-1.5, 2.0])
    assert stored.value("spearman") == pytest.approx(1)


@pytest.mark.parametrize(
    ("labels", "scores", "word"),
    [
        ([0, 1, 3], THREE, "label"),
        ([0, 1, -1], THREE, "label"),
        ([0, 1, 2], np.add(THREE, [0, 0, 0.01]), "probabilities"),
        ([0, 1, 2], np.add(THREE, [-0.5, 0.5, 0]), "probabilities"),
        ([0, 1, 2], np.full((3, 3), np.nan), "probabilities"),
        ([0, 1, 1], THREE[:, :2], "probabilities"),
        ([None] * 3, THREE, "label"),
        ([0.5, 1.0, float("inf")], [0.5] * 3, "label"),
        ([0.5, 1.0, 2.0], [0.5, float("nan"), 1.0], "score"),
        (np.full(3, np.nan), [0.5] * 3, "label"),
    ],
)
def test_odd_values_of_other_tasks_are_refused(in_tmp: Path, labels: Any, scores: Any, word: str) -> None:
    with refuses(Code.DAMAGED) as caught:
        written(labels, scores)
    assert word in caught.value.reason.split()


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[0.2, 0.3, 0.5], [0.2, 0.3, None], [0.2, 0.3, 0.5]], pa.list_(pa.float64(), 3)),
        pa.array([[0.2, 0.3, 0.5]] * 3, pa.list_(pa.float64())),
        pa.array([[0, 0, 1]] * 3, pa.list_(pa.int64(), 3)),
        pa.array(["a", "b", "c"]),
    ],
)
def test_odd_probabilities_are_refused(in_tmp: Path, values: Any) -> None:
    write({"id": [1, 2, 3], "label": [0, 1, 2], "probabilities": values})
    with refuses(Code.DAMAGED) as caught:
        predictions.read(in_tmp, "test")
    assert "probabilities" in caught.value.reason.split()


def test_more_probabilities_than_are_read(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "MAX_VALUES", 8)
    with refuses(Code.DAMAGED) as caught:
        written([0, 1, 2], THREE)
    assert "3 rows of 3 probabilities" in str(caught.value)
