"""The predictions of a run on one split: their Parquet file, encoded and read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_bench.config.metric_names import DEFAULT_THRESHOLD, MAIN_METRIC_CHOICES, SUM_TOLERANCE
from lora_bench.errors import Code, UserError
from lora_bench.evaluation import main_metric
from lora_bench.evaluation.confusion import confusion_matrix
from lora_bench.evaluation.scores import form_of
from lora_bench.files import untrusted
from lora_bench.files.arrow import to_arrow, to_numpy
from lora_bench.records.run_folder import PREDICTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import IO

    from numpy.typing import NDArray

    from lora_bench.records.run_folder import Column

MAX_BYTES = 2**30
"""Size of the largest file that is read."""
MAX_ROWS = 50_000_000
"""Rows of the largest file that is read: a small file can declare any number of rows."""
MAX_VALUES = 4 * MAX_ROWS
"""Probabilities of the largest file that is read: rows times classes."""
_ID, _LABEL = "id", "label"
SCORE, PROBABILITIES = "score", "probabilities"
"""The column of a file with one number per example, and that of a file with one probability per class."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of N examples of one split, sorted by id; only examples with a label.

    The task has two classes, C >= 3 classes, or is a regression (labels are floating-point numbers).
    """

    ids: NDArray[np.int64]
    """Rows in the source: (N,)."""
    labels: NDArray[Any]
    """Classes 0 to C - 1 as integers, or numbers: (N,)."""
    scores: NDArray[np.float64]
    """P(label 1) or predicted numbers: (N,); with three or more classes a probability of each: (N, C)."""

    @property
    def form(self) -> str:
        """The form of the task: a key of `MAIN_METRIC_CHOICES`."""
        return form_of(self.scores, self.labels)

    @cached_property
    def predicted(self) -> NDArray[Any]:
        """The predictions: (N,).

        Two classes: predictions of label 1 as booleans, score at least `DEFAULT_THRESHOLD`. More classes: the index of
        the most probable one. Regression: the scores.
        """
        if self.form == "multiclass":
            return np.asarray(self.scores.argmax(axis=1))
        return self.scores if self.form == "regression" else np.greater_equal(self.scores, DEFAULT_THRESHOLD)

    @property
    def is_constant(self) -> bool:
        """True if the same class or number is predicted for all examples."""
        return bool((self.predicted == self.predicted[0]).all())

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Examples whose predicted class is the true one: (N,). A regression has none."""
        correct: NDArray[np.bool_] = np.equal(self.predicted, self.labels)
        return correct

    def value(self, measure: str) -> float:
        """Return the value of one of the `MAIN_METRIC_CHOICES` of the task's form, such as `f1`.

        Raises:
            ValueError: it is a metric of another form.
        """
        if measure not in MAIN_METRIC_CHOICES[self.form]:
            raise ValueError(f"{measure} is no metric of a {self.form} task")
        return float(main_metric.compute(self.labels, self.predicted, measure))

    def confusion_matrix(self) -> NDArray[np.int64]:
        """Return the number of examples by label (row) and predicted class (column): (C, C). A regression has none."""
        return confusion_matrix(self.labels, self.predicted, self.scores.shape[1] if self.scores.ndim == 2 else 2)

    def has_same_examples(self, other: Predictions) -> bool:
        """Return whether ids and labels agree, so that a paired test can be made."""
        same_form = self.form == other.form and self.scores.shape == other.scores.shape
        return same_form and np.array_equal(self.ids, other.ids) and np.array_equal(self.labels, other.labels)


def encode(ids: Column, labels: Column, scores: Column) -> bytes:
    """Return the bytes of a Parquet file of a split's predictions, with a checksum of each page.

    The columns are id, label and `score`; with three or more classes id, label and `probabilities`. A label is an
    integer; if `labels` holds floating-point numbers, it is one, and the task a regression.

    Args:
        ids: (N,) rows in the source; a list or tuple if `labels` is None.
        labels: (N,) classes or numbers; None, or an entry that is None or NaN, where a label is unknown. The labels of
            a regression that are all unknown are an array of NaN, and not None.
        scores: (N,) P(label 1) or predicted numbers, or (N, C) probabilities of three or more classes.
    """
    labels = [None] * len(ids or ()) if labels is None else labels
    is_regression = _hold_floats(labels)
    # A NaN becomes null, as None does.
    if isinstance(labels, np.ndarray) and not is_regression:
        label_column = to_arrow(labels.astype(np.int64))
    else:
        label_column = pa.array(labels, pa.float64() if is_regression else pa.int64(), from_pandas=is_regression)
    columns = {_ID: to_arrow(np.asarray(ids, np.int64)), _LABEL: label_column}
    if np.ndim(scores) == 2:  # type: ignore[arg-type]
        probabilities = np.asarray(scores, np.float64)
        flat = to_arrow(probabilities.ravel())
        columns[PROBABILITIES] = pa.FixedSizeListArray.from_arrays(flat, probabilities.shape[1])
    else:
        columns[SCORE] = to_arrow(np.asarray(scores, np.float64))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _hold_floats(labels: Sequence[Any] | NDArray[Any]) -> bool:
    """Return whether labels are those of a regression: one of them is a floating-point number."""
    if isinstance(labels, np.ndarray) and labels.dtype != object:
        return np.issubdtype(labels.dtype, np.floating)
    return any(isinstance(label, float | np.floating) for label in labels)


def read(folder: Path, split: str) -> Predictions:
    """Return the predictions of the run in `folder` on a split; rows without a label or a score are left out.

    Raises:
        UserError: the file is missing, cannot be read, its content is invalid, or no row has a label and a score.
    """
    path = folder / PREDICTIONS / f"{split}.parquet"
    try:
        # Not memory-mapped: if the file were truncated while it is read, the process would crash.
        with untrusted.open_file(path, MAX_BYTES) as file:
            return _read(file)
    except FileNotFoundError:
        raise UserError("is missing", file=path, code=Code.NOT_FOUND) from None
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or 'it is damaged'}",
            file=path,
            code=Code.UNREADABLE if error.strerror else Code.DAMAGED,
        ) from None
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"cannot be used: {str(error).splitlines()[0][:200]}", file=path, code=Code.DAMAGED) from None


def read_if_usable(folder: Path, split: str) -> Predictions | None:
    """Return the predictions of the run in `folder` on a split; None where `read` raises an error."""
    try:
        return read(folder, split)
    except UserError:
        return None


def _read(file: IO[bytes]) -> Predictions:
    """Return the predictions in an open file.

    Raises:
        ValueError: a column is missing or of another type, a label, score or id is invalid, or no row remains.
        OSError: a page is damaged.
        ArrowException: it is no Parquet file.
    """
    source = pq.ParquetFile(file, page_checksum_verification=True)
    rows = source.metadata.num_rows
    _require(0 < rows <= MAX_ROWS, f"it declares {rows:,} rows; 1 to {MAX_ROWS:,} are allowed")
    schema = source.schema_arrow
    types = {name: _column_type(schema, name) for name in (_ID, _LABEL, _score_column(schema))}
    _require(_is(pa.types.is_integer, types[_ID]), "column id does not hold integers")
    is_regression = SCORE in types and _is(pa.types.is_floating, types[_LABEL])
    label_type = "numbers" if SCORE in types else "integers"
    _require(is_regression or _is(pa.types.is_integer, types[_LABEL]), f"column label does not hold {label_type}")
    classes = _count_classes(types, rows)
    batches, count = [], 0
    for batch in source.iter_batches(columns=list(types), use_threads=False):
        count += batch.num_rows
        _require(count <= rows, f"it holds more than the {rows:,} rows that it declares")
        batches.append(batch)
    labelled = pa.Table.from_batches(batches).drop_null()
    ids, labels = to_numpy(labelled[_ID]), to_numpy(labelled[_LABEL])
    if is_regression:
        known = ~np.isnan(labels)
        ids, labels, labelled = ids[known], labels[known], labelled.filter(pa.array(known))
    _require(len(ids) > 0, "no row has a label and a score")
    if is_regression:
        scores = to_numpy(labelled[SCORE])
        _require(bool(np.isfinite(labels).all()), "a label is not finite")
        _require(bool(np.isfinite(scores).all()), "a score is not finite")
    elif classes == 2:
        scores = to_numpy(labelled[SCORE])
        _require(bool(np.isin(labels, (0, 1)).all()), "a label is neither 0 nor 1")
        _require(bool(((scores >= 0) & (scores <= 1)).all()), "a score is not between 0 and 1")
    else:
        column = labelled[PROBABILITIES].combine_chunks()
        flat = column.flatten()
        _require(flat.null_count == 0 and len(flat) == len(ids) * classes, "one of the probabilities is missing")
        scores = to_numpy(flat).reshape(-1, classes)
        _require(bool(((labels >= 0) & (labels < classes)).all()), f"a label is not between 0 and {classes - 1}")
        _require(bool(((scores >= 0) & (scores <= 1)).all()), "one of the probabilities is not between 0 and 1")
        sums_to_1 = bool((np.abs(scores.sum(axis=1) - 1) <= SUM_TOLERANCE).all())
        _require(sums_to_1, "the probabilities of a row do not sum to 1")
    order = np.argsort(ids, kind="stable")
    ids = ids[order].astype(np.int64)
    _require(bool((ids[1:] > ids[:-1]).all()), "an id occurs twice")
    return Predictions(
        ids, labels[order].astype(np.float64 if is_regression else np.int64), scores[order].astype(np.float64)
    )


def _score_column(schema: pa.Schema) -> str:
    """Return the name of the column of scores; `score` if there is none, or both."""
    return PROBABILITIES if PROBABILITIES in schema.names and SCORE not in schema.names else SCORE


def _column_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Return the type of a column; None if there is none or more than one of this name."""
    indices = schema.get_all_field_indices(name)
    return schema.field(indices[0]).type if len(indices) == 1 else None


def _is(check: Callable[[pa.DataType], bool], column_type: pa.DataType | None) -> bool:
    """Return whether a column exists once and its type passes a check."""
    return column_type is not None and check(column_type)


def _count_classes(types: Mapping[str, pa.DataType | None], rows: int) -> int:
    """Return the number of probabilities of a row; 2 for a file with one score per row.

    Raises:
        ValueError: the column of scores is of another type, or has fewer than three or too many probabilities.
    """
    if SCORE in types:
        _require(_is(pa.types.is_floating, types[SCORE]), "column score does not hold floating-point numbers")
        return 2
    column = types[PROBABILITIES]
    is_list = column is not None and pa.types.is_fixed_size_list(column) and pa.types.is_floating(column.value_type)
    _require(is_list, "column probabilities does not hold lists of floating-point numbers of one length")
    assert column is not None
    classes = int(column.list_size)
    is_allowed = classes >= 3 and rows * classes <= MAX_VALUES
    limits = f"3 or more classes and {MAX_VALUES:,} probabilities in all are allowed"
    _require(is_allowed, f"it declares {rows:,} rows of {classes:,} probabilities; {limits}")
    return classes


def _require(holds: bool, reason: str) -> None:
    """Raise a `ValueError` unless a condition holds."""
    if not holds:
        raise ValueError(reason)
