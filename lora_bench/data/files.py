"""Readers of local files that do not guess: what is not plainly right is refused, naming file and row.

TSV is read without any quoting: tabs separate, only a line feed (with or without a carriage return before it) ends a
row, and `"`, `NA` and `null` are text. Blank lines at the end are no rows; others are refused, except in TSV of one
column, where they are empty texts. Rows are numbered as an editor counts lines, header included; Parquet's from 1.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import os
import re
import reprlib
import stat
import sys
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.data.examples import Examples
from lora_bench.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from io import BufferedReader

    from numpy.typing import NDArray

STDIN = "-"
_LABELS = {"0": 0, "1": 1, 0: 0, 1: 1}
_shown = reprlib.Repr()  # foreign strings reach a message escaped and cut short
_shown.maxstring = _shown.maxother = 60
_shown.maxlist = 20


@dataclass(frozen=True)
class Table:
    """Named columns of a file or of a split on the hub, values not yet checked."""

    source: str  # a file's path, or what else an error should name
    names: Sequence[str]
    column: Callable[[str], Sequence[Any]]
    rows: Sequence[int]  # (N,) where each record begins, for error messages
    objects: Sequence[Mapping[str, Any]] | None = None  # (N,) of JSONL, where a row may lack a column
    arrow: Callable[[], Any] | None = None  # of Parquet: all columns as a pyarrow.Table, types included

    def examples(
        self,
        text_columns: Sequence[str],
        label_column: str | None,
        *,
        labels_may_hide: bool,
        threshold: float | None = None,
        label_names: Sequence[str] = (),
    ) -> Examples:
        """Checked examples; see `read` for the arguments.

        Labels become 1 from `threshold` on, where it is given; a column that is -1 throughout stays hidden. What
        labels 0 and 1 are called (`label_names`) only helps to explain a refusal.
        """
        if not self.rows:
            raise UserError("has a header but no rows", file=self.source, remedy="Give at least one labelled row.")
        texts = tuple(self._texts(name) for name in text_columns)
        labels = None
        if label_column is not None:
            labels = self._labels(label_column, labels_may_hide, threshold, label_names)
        return Examples(np.arange(len(self.rows), dtype=np.int64), texts, labels)

    def _texts(self, name: str) -> list[str]:
        self._need_column(name, "data.text_columns")
        values = list(self.column(name))
        for row, value in zip(self.rows, values, strict=True):
            if type(value) is not str:
                raise self._error(f"{_shown.repr(name)} is {_shown.repr(value)}, not a text", row)
        try:
            "".join(values).encode()
        except UnicodeEncodeError:  # JSON can write half a character: "\ud800"
            bad = next(i for i, value in enumerate(values) if value.encode(errors="replace").decode() != value)
            raise self._error(f"{_shown.repr(name)} holds half of a surrogate pair", self.rows[bad]) from None
        return values

    def _labels(
        self, name: str, may_hide: bool, threshold: float | None, label_names: Sequence[str]
    ) -> NDArray[np.int64] | None:
        if may_hide and name not in self.names:
            return None
        self._need_column(name, "data.label_column")
        values = self.column(name)
        if threshold is not None:
            numbers = self._numbers(name, values)
            return None if may_hide and (numbers == -1).all() else (numbers >= threshold).astype(np.int64)
        # Only str and int are looked up: True and 1.0 would find the 1 of a dict.
        labels = [_LABELS.get(value) if type(value) in (str, int) else None for value in values]
        if None not in labels:
            return np.array(labels, dtype=np.int64)
        if may_hide and all(type(value) in (str, int) and value in ("-1", -1) for value in values):
            return None
        bad = labels.index(None)
        allowed = "0 or 1 in every row" + (", or -1 in all of them where labels are hidden" if may_hide else "")
        raise self._error(
            f"label {_shown.repr(values[bad])} is neither 0 nor 1",
            self.rows[bad],
            f"The column that data.label_column={name} names must hold {allowed}. "
            + _mapping(values, bad, label_names, may_hide),
        )

    def _numbers(self, name: str, values: Sequence[Any]) -> NDArray[np.float64]:
        """(N,) the column's values, finite numbers all."""
        found = np.full(len(values), np.nan)
        for i, value in enumerate(values):
            if type(value) in (str, int, float):
                with suppress(ValueError, OverflowError):
                    found[i] = float(value)
        bad = np.flatnonzero(~np.isfinite(found))
        if len(bad):
            raise self._error(
                f"label {_shown.repr(values[bad[0]])} is not a number",
                self.rows[bad[0]],
                f"data.label_threshold makes labels of numbers, which {name} must hold in every row.",
            )
        return found

    def _need_column(self, name: str, key: str) -> None:
        if name not in self.names:
            columns = list(self.names)
            hint = nearest(name, (repr(column)[1:-1][:60] for column in columns[:200]))
            remedy = f"Its columns: {_shown.repr(columns)}. {hint if hint.startswith('Did') else ''} {key} names them."
            raise UserError(f"has no column {_shown.repr(name)}", file=self.source, remedy=remedy)

    def _error(self, reason: str, row: int, remedy: str = "") -> UserError:
        return UserError(reason, file=self.source, row=row, remedy=remedy)


def read(
    path: str | Path, text_columns: Sequence[str], label_column: str | None, *, labels_may_hide: bool = False
) -> Examples:
    """Read one .tsv, .csv, .jsonl or .parquet file, or TSV from standard input where `path` is `-`.

    Args:
        path: the file; its ending says what it is.
        text_columns: columns to read, in this order. Every value must be a string; none is altered.
        label_column: column with 0 or 1 in every row; None: labels are neither needed nor looked at.
        labels_may_hide: a test split, where the label column may be absent or -1 throughout (`labels` is then None).

    Raises:
        UserError: naming file and row, for anything but exactly that.
    """
    return read_table(path).examples(text_columns, label_column, labels_may_hide=labels_may_hide)


def read_table(path: str | Path) -> Table:
    """Read the columns of a file, values not yet checked; see `read`."""
    source = "standard input" if str(path) == STDIN else str(path)
    kind = format_of(path)
    if kind is None:
        raise UserError(
            f"is none of {', '.join(READERS)}", file=source, remedy="Its name must end so; unpack it if it is packed."
        )
    raw = _read_bytes(path, source)
    if not raw:
        raise UserError("is empty", file=source, remedy="Give a header row and at least one row of data.")
    table = READERS[kind](source, raw)
    names: set[str] = set()
    for name in table.names:
        if name in names:
            reason = f"has two columns named {_shown.repr(name)}"
            raise UserError(reason, file=source, row=1, remedy="Rename one of them.")
        names.add(name)
    return table


def split_files(folder: str) -> dict[str, str]:
    """The paths of a folder's train, validation and test files, those that exist.

    Raises:
        UserError: there are none, or two for one split.
    """
    found: dict[str, str] = {}
    for split in ("train", "validation", "test"):
        paths = [path for kind in READERS if os.path.isfile(path := os.path.join(folder, split + kind))]
        if len(paths) > 1:
            raise UserError(
                f"has both {' and '.join(os.path.basename(path) for path in paths)}",
                key="data.path",
                value=folder,
                remedy=f"Keep one file for {split}.",
            )
        found |= dict.fromkeys([split], paths[0]) if paths else {}
    if not found:
        raise UserError(
            "holds no train, validation or test file",
            key="data.path",
            value=folder,
            remedy=f"Name them train, validation or test with one of {', '.join(READERS)}; "
            "other names (dev, valid, eval) are not guessed.",
        )
    return found


def format_of(path: str | Path) -> str | None:
    """Return the format that a file's ending names; None: none. Streams without an ending are TSV.

    A stream is `-`, an open file of this process (`/dev/stdin`, `/dev/fd/63`), a FIFO or a character device.
    """
    ending = Path(path).suffix
    if ending in READERS:
        return ending
    if str(path) == STDIN or descriptor_of(path) is not None:
        return ".tsv"
    with suppress(OSError, ValueError):
        mode = os.stat(path).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return ".tsv"
    return None


def descriptor_of(path: str | Path) -> int | None:
    """Return the number of the open file that a path such as `/dev/stdout` or `/dev/fd/3` stands for."""
    found = re.fullmatch(r"/dev/(stdin|stdout|stderr)|/(?:dev|proc/self)/fd/(\d{1,6})", str(path))
    if found is None:
        return None
    return ("stdin", "stdout", "stderr").index(found[1]) if found[1] else int(found[2])


def _read_bytes(path: str | Path, source: str) -> bytes:
    """Read a file, a FIFO or standard input to its end; refuse a device, which may have none."""
    try:
        with nullcontext(_standard_input()) if str(path) == STDIN else open(path, "rb") as file:
            if _is_endless(file):
                raise UserError("is a device, not a file", file=source, remedy="Give a file with a header row.")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}", file=source) from None


def _standard_input() -> BufferedReader:
    if sys.stdin is None:
        raise UserError("is closed", file="standard input")
    return sys.stdin.buffer  # type: ignore[return-value]


def _is_endless(file: BufferedReader) -> bool:
    try:
        status = os.fstat(file.fileno())
    except OSError:  # a stream of Python's own
        return False
    if stat.S_ISCHR(status.st_mode):
        return not (file.isatty() or os.path.samestat(status, os.stat(os.devnull)))
    return stat.S_ISBLK(status.st_mode)


def _mapping(values: Sequence[Any], bad: int, label_names: Sequence[str], may_hide: bool) -> str:
    """Say how labels other than 0 and 1 become such.

    Args:
        values: the column.
        bad: the position of the first that is neither.
        label_names: what the task calls 0 and 1.
        may_hide: -1 may stand for no label.
    """
    label = values[bad]
    if label in label_names:
        pairs = " and ".join(f"{i} for {_shown.repr(name)}" for i, name in enumerate(label_names))
        return f"data.label_names only says what 0 and 1 are called: write {pairs} in the file."
    distinct = {value: None for value in values[:10_000] if type(value) in (str, int, float, bool)}
    if type(label) is bool:
        return "Write 0 for false and 1 for true."
    numbers: list[float] = []
    with suppress(ValueError, OverflowError):
        numbers = sorted({number for number in map(float, distinct) if not may_hide or number != -1})
    if len(numbers) == 2 and -math.inf < numbers[0] and numbers[1] < math.inf:
        return f"Or give data.label_threshold={numbers[1]:g}: labels are then 1 from there on, and 0 below."
    if len(numbers) > 2:
        return "Numbers of more than two values become 0 and 1 by data.label_threshold, the least that counts as 1."
    if len(distinct) == 2 and type(label) is str:
        return f"Write 0 for one and 1 for the other of {' and '.join(map(_shown.repr, distinct))}."
    if len(distinct) > 2:
        return "Tasks have two classes: keep the rows of two of the labels, or merge them into two, called 0 and 1."
    return ""


_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with UTF-16's mark
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def _lines(source: str, raw: bytes, separator: str | None = None) -> list[str]:
    """Return UTF-8 lines without their line feeds, and without blank ones at the end.

    A carriage return before the line feed is still there. CSV alone may hold NUL, between quotes.

    Args:
        source: what an error names.
        raw: the file's content.
        separator: what separates columns; None: lines are JSON.
    """
    for mark, encoding in _ENCODINGS.items():
        if raw.startswith(mark):
            remedy = f"Save it as UTF-8: iconv -f {encoding} -t UTF-8 OLD > NEW."
            raise UserError(f"is in {encoding}, not in UTF-8", file=source, row=1, remedy=remedy)
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        row = raw.count(b"\n", 0, error.start) + 1
        raise UserError("is not UTF-8", file=source, row=row, remedy="Save it as UTF-8.") from None
    if "\0" in text:
        outside = re.sub('"[^"]*"', _line_feeds, text) if separator == "," else text
        nul = outside.find("\0")
        if nul >= 0:
            row = outside.count("\n", 0, nul) + 1
            raise UserError("holds a NUL byte", file=source, row=row, remedy="Save it as UTF-8.")
    if "\n" not in text and "\r" in text.rstrip("\r"):
        remedy = "Give them line feeds: tr '\\r' '\\n' < OLD > NEW."
        raise UserError("has lines that end in carriage returns alone, as on old Macs", file=source, remedy=remedy)
    lines = text.split("\n")
    blank = " \t\r" if separator is None else " \r" if separator in lines[0] else "\r"
    while lines and not lines[-1].strip(blank):
        lines.pop()
    if not lines:
        raise UserError("is empty", file=source, remedy="Give a header row and at least one row of data.")
    return lines


def _line_feeds(text: re.Match[str]) -> str:
    return "\n" * text[0].count("\n")


def _records(source: str, header: list[str], records: list[list[str]], rows: Sequence[int], remedy: str) -> Table:
    width = len(header)
    for row, record in zip(rows, records, strict=True):
        if len(record) == width:
            continue
        if not "".join(record).strip():
            raise UserError("is blank", file=source, row=row, remedy=f"Delete the line. {remedy}")
        counts = f"{len(record)} column{'s' * (len(record) != 1)} where the header has {width}"
        if any("\r" in cell for cell in record):
            counts += ", and a carriage return alone, which ends no row"
        raise UserError(counts, file=source, row=row, remedy=remedy)

    def column(name: str) -> list[str]:
        place = header.index(name)
        return [record[place] for record in records]

    return Table(source, header, column, rows)


def _tsv(source: str, raw: bytes) -> Table:
    header, *records = [line.removesuffix("\r").split("\t") for line in _lines(source, raw, "\t")]
    remedy = "Every row needs one tab between columns; a text holds no tab and no line break, and quotes mean nothing."
    return _records(source, header, records, range(2, len(records) + 2), remedy)


def _csv(source: str, raw: bytes) -> Table:
    lines = _lines(source, raw, ",")
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
        raise UserError(f"is not valid CSV: {reason}", file=source, row=start, remedy=remedy) from None
    return _records(source, records[0], records[1:], rows[1:], remedy)


# The csv module's complaints, in our words.
_CSV_ERRORS = {
    "unexpected end": "unbalanced quotes",
    "new-line character": "a carriage return alone, outside quotes",
}


def _jsonl(source: str, raw: bytes) -> Table:
    objects: list[dict[str, Any]] = []
    for row, line in enumerate(_lines(source, raw), start=1):
        remedy = "Every line must be one JSON object."
        if not line.strip():
            raise UserError("is blank", file=source, row=row, remedy=f"Delete the line. {remedy}")
        try:
            value = json.loads(line, object_pairs_hook=_object, parse_int=_whole_number)
        except (ValueError, RecursionError) as error:
            # Its own message counts lines from this one.
            reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"is not valid JSON: {reason}", file=source, row=row, remedy=remedy) from None
        if not isinstance(value, dict):
            raise UserError(f"is not a JSON object but {_shown.repr(value)}", file=source, row=row, remedy=remedy)
        objects.append(value)

    def column(name: str) -> list[Any]:
        for row, value in enumerate(objects, start=1):
            if name not in value:
                raise UserError(f"has no {_shown.repr(name)}", file=source, row=row, remedy="Other rows have it.")
        return [value[name] for value in objects]

    names = list(dict.fromkeys(name for value in objects for name in value))
    return Table(source, names, column, range(1, len(objects) + 1), objects)


def _whole_number(digits: str) -> int:
    if len(digits) > 4000:  # Python itself stops at 4,300
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is given twice")
    return made


def _parquet(source: str, raw: bytes) -> Table:
    import pyarrow  # late: a fifth of a second that the other formats do not need
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(raw))
        names, count = file.schema_arrow.names, file.metadata.num_rows
    except Exception as error:  # a damaged file raises a dozen unrelated types
        raise UserError(f"is not valid Parquet: {_first_line(error)}", file=source) from None

    def read_columns(columns: list[str] | None) -> Any:
        found = file.read(columns=columns)
        found.validate(full=True)  # strings that are not UTF-8
        if len(found) != count:
            raise ValueError(f"it has {len(found)} of {count} rows")
        return found

    def column(name: str) -> list[Any]:
        try:
            values: list[Any] = read_columns([name]).column(name).to_pylist()
        except Exception as error:  # as above
            reason = f"column {_shown.repr(name)} cannot be read: {_first_line(error)}"
            raise UserError(reason, file=source) from None
        return values

    def arrow() -> Any:
        try:
            return read_columns(None)
        except Exception as error:  # as above
            raise UserError(f"cannot be read: {_first_line(error)}", file=source) from None

    return Table(source, names, column, range(1, count + 1), arrow=arrow)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


READERS: dict[str, Callable[[str, bytes], Table]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
