"""The predictions of a run on one split: their Parquet file, encoded and read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lora_bench.config.metric_names import DEFAULT_THRESHOLD
from lora_bench.errors import Code, UserError
from lora_bench.evaluation import confusion
from lora_bench.files import untrusted
from lora_bench.records.run_folder import PREDICTIONS

if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO

    from numpy.typing import NDArray

    from lora_bench.records.run_folder import Column

MAX_BYTES = 2**30
"""Size of the largest file that is read."""
MAX_ROWS = 50_000_000
"""Rows of the largest file that is read: a small file can declare any number of rows."""
_COLUMNS = (
    ("id", pa.types.is_integer, "integers"),
    ("label", pa.types.is_integer, "integers"),
    ("score", pa.types.is_floating, "floating-point numbers"),
)


@dataclass(frozen=True)
class Predictions:
    """The predictions of N examples of one split, sorted by id; only examples with a label."""

    ids: NDArray[np.int64]
    """Rows in the source: (N,)."""
    labels: NDArray[np.int64]
    """0 or 1: (N,)."""
    scores: NDArray[np.float64]
    """P(label 1): (N,)."""

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Predictions of label 1, score at least `DEFAULT_THRESHOLD`: (N,)."""
        predicted: NDArray[np.bool_] = np.greater_equal(self.scores, DEFAULT_THRESHOLD)
        return predicted

    @property
    def is_constant(self) -> bool:
        """True if the same label is predicted for all examples."""
        return bool(self.predicted.all() or not self.predicted.any())

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Examples whose predicted label is the true one: (N,)."""
        correct: NDArray[np.bool_] = np.equal(self.predicted, self.labels == 1)
        return correct

    @property
    def mcc(self) -> float:
        """Matthews correlation."""
        return self.value("mcc")

    def value(self, measure: str) -> float:
        """Return the value of one of `MAIN_METRICS`, such as `f1`."""
        return float(confusion.compute_metric(confusion.confusion_counts(self.labels, self.predicted), measure))

    def has_same_examples(self, other: Predictions) -> bool:
        """Return whether ids and labels agree, so that a paired test can be made."""
        return np.array_equal(self.ids, other.ids) and np.array_equal(self.labels, other.labels)


def encode(ids: Column, labels: Column, scores: Column) -> bytes:
    """Return the bytes of a Parquet file of a split's predictions, with a checksum of each page.

    Args:
        ids: (N,) rows in the source; a list or tuple if `labels` is None.
        labels: (N,); None, or an entry of it, where a label is unknown.
        scores: (N,) P(label 1).
    """
    labels = [None] * len(ids or ()) if labels is None else labels
    columns = {"id": pa.array(ids, pa.int64()), "label": pa.array(labels, pa.int64())}
    table = pa.table(columns | {"score": pa.array(scores, pa.float64())})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


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
    for name, is_type, type_name in _COLUMNS:
        fields = [schema.field(i) for i in schema.get_all_field_indices(name)]
        _require(len(fields) == 1 and is_type(fields[0].type), f"column {name} does not hold {type_name}")
    batches, count = [], 0
    for batch in source.iter_batches(columns=[name for name, _, _ in _COLUMNS], use_threads=False):
        count += batch.num_rows
        _require(count <= rows, f"it holds more than the {rows:,} rows that it declares")
        batches.append(batch)
    labelled = pa.Table.from_batches(batches).drop_null()
    ids, labels, scores = (labelled[name].to_numpy() for name, _, _ in _COLUMNS)
    _require(len(ids) > 0, "no row has a label and a score")
    _require(bool(np.isin(labels, (0, 1)).all()), "a label is neither 0 nor 1")
    _require(bool(((scores >= 0) & (scores <= 1)).all()), "a score is not between 0 and 1")
    order = np.argsort(ids, kind="stable")
    ids = ids[order].astype(np.int64)
    _require(bool((ids[1:] > ids[:-1]).all()), "an id occurs twice")
    return Predictions(ids, labels[order].astype(np.int64), scores[order].astype(np.float64))


def _require(holds: bool, reason: str) -> None:
    """Raise a `ValueError` unless a condition holds."""
    if not holds:
        raise ValueError(reason)
