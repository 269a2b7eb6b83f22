"""Readers of local files; whatever is not exactly in the expected format is refused, naming file and row.

TSV is read without any quoting: tabs separate, only a line feed (with or without a carriage return before it) ends a
row, and `"`, `NA` and `null` are text. Blank lines at the end are no rows; others are refused, except in TSV of one
column, where they are empty texts. Rows are numbered as an editor counts lines, header included; Parquet's from 1.
"""

from __future__ import annotations

import csv
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.data.examples import Examples
from lora_bench.data.labels import ClassLabels, LabelError, LabelFormat, excerpt, infer_names
from lora_bench.data.lines import split_lines
from lora_bench.errors import Code, UserError, nearest
from lora_bench.files.paths import STREAM, is_stream, read_input

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

BINARY_NUMBERS = ClassLabels(("0", "1"))
"""The format of labels 0 and 1."""


@dataclass(frozen=True)
class Table:
    """Named columns of a file or of a split on the hub; values are not yet checked."""

    source: str  # a file's path, or what else an error should name
    names: Sequence[str]
    column: Callable[[str], Sequence[Any]]
    rows: Sequence[int]  # (N,) where each record begins, for error messages
    objects: Sequence[Mapping[str, Any]] | None = None  # (N,) of JSONL, where a row may lack a column
    arrow: Callable[[], Any] | None = None  # of Parquet: all columns as a pyarrow.Table, types included
    declared_names: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of classes, by column (`ClassLabel`)

    def examples(
        self,
        text_columns: Sequence[str],
        label_column: str | None,
        label_format: LabelFormat = BINARY_NUMBERS,
        *,
        labels_may_hide: bool,
    ) -> Examples:
        """Check texts and labels, and return them with the ids 0 to N - 1; see `read` for the arguments and errors.

        `labels` is None without `label_column`, and where they are hidden: in a column that is absent or -1 throughout.
        A table without rows is refused.
        """
        if not self.rows:
            raise UserError(
                "has a header but no rows", file=self.source, remedy="Give at least one labelled row.", code=Code.EMPTY
            )
        texts = tuple(self._texts(name) for name in text_columns)
        labels = None
        if label_column is not None:
            labels = self._labels(label_column, label_format, labels_may_hide)
        return Examples(np.arange(len(self.rows), dtype=np.int64), texts, labels)

    def class_names(self, label_column: str) -> list[str]:
        """Return the classes of the label column: those that the file's own metadata names, else its distinct values.

        Raises:
            UserError: there is no such column, or its values are no classes (`infer_names`).
        """
        self._require_column(label_column, "data.label_column")
        if label_column in self.declared_names:
            return list(self.declared_names[label_column])
        with self._locating_errors(label_column):
            return infer_names(self.column(label_column), label_column)

    def _texts(self, name: str) -> list[str]:
        """Return the N texts of a column, unaltered.

        Raises:
            UserError: there is no such column, or a value is not a string or holds half of a surrogate pair.
        """
        self._require_column(name, "data.text_columns")
        values = list(self.column(name))
        for row, value in zip(self.rows, values, strict=True):
            if type(value) is not str:
                raise self._error(f"{excerpt(name)} is {excerpt(value)}, not a text", row)
        try:
            "".join(values).encode()
        except UnicodeEncodeError:  # JSON can write half a character: "\ud800"
            bad = next(i for i, value in enumerate(values) if value.encode(errors="replace").decode() != value)
            raise self._error(f"{excerpt(name)} holds half of a surrogate pair", self.rows[bad]) from None
        return values

    def _labels(
        self, name: str, label_format: LabelFormat, may_hide: bool
    ) -> NDArray[np.int64] | NDArray[np.float64] | None:
        """Return the labels of a column, (N,); None if they are hidden.

        Args:
            name: the column.
            label_format: of its values.
            may_hide: allow hidden labels: no such column, or -1 in every row.

        Raises:
            UserError: there is no such column, or a value is not in the format; the row is named.
        """
        if may_hide and name not in self.names:
            return None
        self._require_column(name, "data.label_column")
        values = self.column(name)
        if may_hide and label_format.is_hidden(values):
            return None
        with self._locating_errors(name):
            return label_format.read(values, name)

    @contextmanager
    def _locating_errors(self, column: str) -> Iterator[None]:
        """Raise a `LabelError` of the context as a `UserError` that names file and row."""
        try:
            yield
        except LabelError as error:
            row = None if error.position is None else self.rows[error.position]
            reason = error.reason if row is not None else f"column {excerpt(column)}: {error.reason}"
            if error.earlier is not None:
                reason += f" of row {self.rows[error.earlier]}"
            raise UserError(reason, file=self.source, row=row, remedy=error.remedy, code=Code.INVALID_DATA) from None

    def _require_column(self, name: str, key: str) -> None:
        """Raise a `UserError` if there is no column of this name; `key` is the config key that gives the name."""
        if name not in self.names:
            columns = list(self.names)
            hint = nearest(name, (repr(column)[1:-1][:60] for column in columns[:200]))
            remedy = f"Its columns: {excerpt(columns)}. {hint if hint.startswith('Did') else ''} {key} names them."
            raise UserError(f"has no column {excerpt(name)}", file=self.source, remedy=remedy, code=Code.INVALID_DATA)

    def _error(self, reason: str, row: int, remedy: str = "") -> UserError:
        return UserError(reason, file=self.source, row=row, remedy=remedy, code=Code.INVALID_DATA)


def read(
    path: str | Path, text_columns: Sequence[str], label_column: str | None, *, labels_may_hide: bool = False
) -> Examples:
    """Read one .tsv, .csv, .jsonl or .parquet file, or TSV from standard input where `path` is `-`.

    Args:
        path: the file; its ending says what it is.
        text_columns: columns to read, in this order. Every value must be a string; none is altered.
        label_column: column with 0 or 1 in every row; None: labels are not read.
        labels_may_hide: a test split, where the label column may be absent or -1 throughout (`labels` is then None).

    Raises:
        UserError: naming file and row, for anything but exactly that.
    """
    return read_table(path).examples(text_columns, label_column, labels_may_hide=labels_may_hide)


def read_table(path: str | Path) -> Table:
    """Read the columns of a file, or TSV from standard input where `path` is `-`; values are not yet checked.

    Raises:
        UserError: its ending is unknown, it cannot be read, is empty or not in its format, or two columns have one
            name.
    """
    source = "standard input" if str(path) == STREAM else str(path)
    suffix = file_format(path)
    if suffix is None:
        raise UserError(
            f"is none of {', '.join(READERS)}",
            file=source,
            remedy="Its name must end so; unpack it if it is packed.",
            code=Code.UNKNOWN_CHOICE,
        )
    raw = read_input(path, source)
    if not raw:
        raise UserError(
            "is empty", file=source, remedy="Give a header row and at least one row of data.", code=Code.EMPTY
        )
    table = READERS[suffix](source, raw)
    names: set[str] = set()
    for name in table.names:
        if name in names:
            reason = f"has two columns named {excerpt(name)}"
            raise UserError(reason, file=source, row=1, remedy="Rename one of them.", code=Code.INVALID_DATA)
        names.add(name)
    return table


def find_split_files(folder: str) -> dict[str, str]:
    """Return the paths of the train, validation and test files that a folder has, by split; other files are ignored.

    Raises:
        UserError: there are none, or two for one split, or one is no regular file, such as a link that leads nowhere.
    """
    path_by_split: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        paths = [path for suffix in READERS if os.path.lexists(path := os.path.join(folder, split + suffix))]
        for path in paths:  # another split would be reported in the place of one that is passed over
            if not os.path.isfile(path):
                remedy = f"Give a file for {split}, or remove it."
                raise UserError("is not a regular file", file=path, remedy=remedy, code=Code.NOT_A_FILE)
        if len(paths) > 1:
            raise UserError(
                f"has both {' and '.join(os.path.basename(path) for path in paths)}",
                key="data.path",
                value=folder,
                remedy=f"Keep one file for {split}.",
                code=Code.CONFLICT,
            )
        if paths:
            path_by_split[split] = paths[0]
    if not path_by_split:
        raise UserError(
            "holds no train, validation or test file",
            key="data.path",
            value=folder,
            remedy=f"Name them train, validation or test with one of {', '.join(READERS)}; "
            "other names (dev, valid, eval) are not guessed.",
            code=Code.NOT_FOUND,
        )
    return path_by_split


def file_format(path: str | Path) -> str | None:
    """Return the suffix of `READERS` that a path has; `.tsv` for a stream without one; None for other paths."""
    ending = Path(path).suffix
    return ending if ending in READERS else ".tsv" if is_stream(path) else None


def _records(source: str, header: list[str], records: list[list[str]], rows: Sequence[int], remedy: str) -> Table:
    """Return the table of TSV or CSV records; its values are texts.

    Args:
        source: the file, for messages.
        header: names of the columns.
        records: cells of each record; there may be none.
        rows: the line where each record begins.
        remedy: what the format requires, for messages.

    Raises:
        UserError: a record is blank, or has more or fewer cells than the header.
    """
    width = len(header)
    for row, record in zip(rows, records, strict=True):
        if len(record) == width:
            continue
        if not "".join(record).strip():
            raise UserError(
                "is blank", file=source, row=row, remedy=f"Delete the line. {remedy}", code=Code.INVALID_DATA
            )
        counts = f"{len(record)} column{'s' * (len(record) != 1)} where the header has {width}"
        if any("\r" in cell for cell in record):
            counts += ", and a carriage return alone, which ends no row"
        raise UserError(counts, file=source, row=row, remedy=remedy, code=Code.INVALID_DATA)

    def column(name: str) -> list[str]:
        index = header.index(name)
        return [record[index] for record in records]

    return Table(source, header, column, rows)


def _tsv(source: str, raw: bytes) -> Table:
    """Return the table of a TSV file, of which the first line is the header; a quote is an ordinary character.

    Raises:
        UserError: as `split_lines` and `_records`.
    """
    header, *records = [line.removesuffix("\r").split("\t") for line in split_lines(source, raw, "\t")]
    remedy = "Every row needs one tab between columns; a text holds no tab and no line break, and quotes mean nothing."
    return _records(source, header, records, range(2, len(records) + 2), remedy)


def _csv(source: str, raw: bytes) -> Table:
    """Return the table of a CSV file, of which the first record is the header.

    The limit on the length of a field is raised for the whole process.

    Raises:
        UserError: it is not valid CSV, the quotes of a record are unbalanced, or as `split_lines` and `_records`; the
            row is the line where the record begins.
    """
    lines = split_lines(source, raw, ",")
    csv.field_size_limit(2**31 - 1)  # of the whole process; the default of 131,072 characters is less than a long text
    reader = csv.reader((line + "\n" for line in lines), strict=True)
    remedy = 'A text with a comma, quote or line break stands in "quotes", and a quote inside it is doubled.'
    records: list[list[str]] = []
    rows: list[int] = []
    start = 1  # the line where the record begins: an open quote swallows all that follows
    try:
        for record in reader:
            # The csv module takes a quote inside an unquoted field as text: an odd one is a mistake all the same.
            if sum(line.count('"') for line in lines[start - 1 : reader.line_num]) % 2:
                raise csv.Error("unbalanced quotes")
            records.append(record)
            rows.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        reason = next((words for sign, words in _CSV_ERRORS.items() if sign in str(error)), str(error))
        raise UserError(
            f"is not valid CSV: {reason}", file=source, row=start, remedy=remedy, code=Code.INVALID_DATA
        ) from None
    return _records(source, records[0], records[1:], rows[1:], remedy)


# The csv module's complaints, in our words.
_CSV_ERRORS = {
    "unexpected end": "unbalanced quotes",
    "new-line character": "a carriage return alone, outside quotes",
}


def _jsonl(source: str, raw: bytes) -> Table:
    """Return the table of a JSON Lines file; its columns are the keys of all its objects, values of any type.

    A key that some rows lack is refused only when its column is read.

    Raises:
        UserError: a line is blank, or not one JSON object without duplicate keys and with finite numbers; the row is
            named. Or as `split_lines`.
    """
    objects: list[dict[str, Any]] = []
    for row, line in enumerate(split_lines(source, raw), start=1):
        remedy = "Every line must be one JSON object."
        if not line.strip():
            raise UserError(
                "is blank", file=source, row=row, remedy=f"Delete the line. {remedy}", code=Code.INVALID_DATA
            )
        try:
            value = json.loads(
                line,
                object_pairs_hook=_object,
                parse_int=_whole_number,
                parse_float=_finite_number,
                parse_constant=_finite_number,
            )
        except (ValueError, RecursionError) as error:
            # Its own message counts lines from this one.
            reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(
                f"is not valid JSON: {reason}", file=source, row=row, remedy=remedy, code=Code.INVALID_DATA
            ) from None
        if not isinstance(value, dict):
            raise UserError(
                f"is not a JSON object but {excerpt(value)}",
                file=source,
                row=row,
                remedy=remedy,
                code=Code.INVALID_DATA,
            )
        objects.append(value)

    def column(name: str) -> list[Any]:
        """Return the values of a column; a `UserError` if a row lacks it."""
        for row, value in enumerate(objects, start=1):
            if name not in value:
                raise UserError(
                    f"has no {excerpt(name)}",
                    file=source,
                    row=row,
                    remedy="Other rows have it.",
                    code=Code.INVALID_DATA,
                )
        return [value[name] for value in objects]

    names = list(dict.fromkeys(name for value in objects for name in value))
    return Table(source, names, column, range(1, len(objects) + 1), objects)


def _whole_number(digits: str) -> int:
    """Return the integer in a JSON text; ValueError if it has more than 4,000 digits."""
    if len(digits) > 4000:  # Python itself stops at 4,300
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _finite_number(text: str) -> float:
    """Return a number with a decimal point or exponent in a JSON text; ValueError if it is NaN or infinite."""
    number = float(text)
    if not math.isfinite(number):
        # Such a value could not be written as JSON again.
        raise ValueError(f"{excerpt(text)} is not a finite number; null stands for an unknown value")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; ValueError if it has a duplicate key."""
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a key is given twice")
    return members


def _parquet(source: str, raw: bytes) -> Table:
    """Return the table of a Parquet file; a column is read each time when it is used.

    Raises:
        UserError: it is not valid Parquet. A damaged column raises it when the column is read.
    """
    import pyarrow  # late: a fifth of a second that the other formats do not need
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(raw))
        names, count = file.schema_arrow.names, file.metadata.num_rows
    except Exception as error:  # a damaged file raises a dozen unrelated types
        raise UserError(f"is not valid Parquet: {_first_line(error)}", file=source, code=Code.DAMAGED) from None

    def read_columns(columns: list[str] | None) -> Any:
        """Return these columns (None: all) as a pyarrow.Table; an exception of any type if they are damaged."""
        table = file.read(columns=columns)
        table.validate(full=True)  # strings that are not UTF-8
        if len(table) != count:
            raise ValueError(f"it has {len(table)} of {count} rows")
        return table

    def column(name: str) -> list[Any]:
        """Return the values of a column; a `UserError` if it is damaged."""
        try:
            values: list[Any] = read_columns([name]).column(name).to_pylist()
        except Exception as error:  # as above
            reason = f"column {excerpt(name)} cannot be read: {_first_line(error)}"
            raise UserError(reason, file=source, code=Code.DAMAGED) from None
        return values

    def arrow() -> Any:
        """Return all columns as a pyarrow.Table; a `UserError` if one is damaged."""
        try:
            return read_columns(None)
        except Exception as error:  # as above
            raise UserError(f"cannot be read: {_first_line(error)}", file=source, code=Code.DAMAGED) from None

    return Table(source, names, column, range(1, count + 1), arrow=arrow, declared_names=_declared(file.schema_arrow))


def _declared(schema: Any) -> dict[str, list[str]]:
    """Return the class names that `datasets` noted in a Parquet file's metadata, by column; empty if there are none."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])
        features = {name: feature for name, feature in info["info"]["features"].items() if "names" in feature}
        names = {name: list(map(str, feature["names"])) for name, feature in features.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    return {name: of_column for name, of_column in names.items() if len(of_column) == len(set(of_column)) > 1}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


READERS: dict[str, Callable[[str, bytes], Table]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
