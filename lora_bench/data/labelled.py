"""Rows of an input file with predictions beside them, as TSV, CSV, JSONL or Parquet.

Every column of the input is there, in its order. CSV, JSONL and Parquet hold any text unchanged; TSV cannot hold tabs,
line breaks and NUL, which become spaces. What is no text is JSON text in TSV and CSV, and keeps its type in JSONL and,
from Parquet, in Parquet.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_bench.data.readers import Table

FORMATS = (".tsv", ".csv", ".jsonl", ".parquet")
_NOT_IN_TSV = re.compile("[\t\r\n\0]")


def unique_column_names(names: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Return a name for each column of predictions that neither a column of the input nor another of them has.

    Returns:
        by name, the name to write: `label`, or `predicted_label` where the input has a `label`, or `predicted_label_2`
        where it has both.
    """
    used, written = set(taken), {}
    for name in names:
        new, number = name, 1
        while new in used:
            new = f"predicted_{name}" + (f"_{number}" if number > 1 else "")
            number += 1
        written[name] = new
        used.add(new)
    return written


def probability_columns(names: Sequence[str]) -> list[str]:
    """Return a column name for the probability of each class: `p_` and its name, of letters, digits, `-`, `.` and `_`.

    Other characters become `_`, and names are cut after 60 characters. A name that is then taken gets a number.

    Args:
        names: of the classes.
    """
    columns: dict[str, None] = {}
    for name in names:
        stem = column = "p_" + re.sub(r"[^\w.-]+", "_", name)[:60]
        number = 1
        while column in columns:
            number += 1
            column = f"{stem}_{number}"
        columns[column] = None
    return list(columns)


def check_texts(table: Table, suffix: str) -> None:
    """Refuse texts that a format cannot hold: half of a surrogate pair, which JSON alone can write.

    Only tables of JSONL are checked: their column names, and values that are texts. Nothing is checked for `.jsonl`.

    Raises:
        UserError: naming file and row.
    """
    if table.objects is None or suffix == ".jsonl":
        return
    for row, record in zip(table.rows, table.objects, strict=True):
        for name, value in record.items():
            try:
                (name + value if type(value) is str else name).encode()
            except UnicodeEncodeError:
                remedy = "Give an output that ends in .jsonl."
                reason = f"{name!a} holds half of a surrogate pair, which {suffix[1:]} cannot hold"
                raise UserError(reason, file=table.source, row=row, remedy=remedy, code=Code.INVALID_DATA) from None


def encode(table: Table, predictions: Mapping[str, Sequence[Any]], suffix: str) -> tuple[bytes, int]:
    """Encode a table with predictions behind its columns.

    A value that a row of JSONL lacks is an empty cell in TSV and CSV, null in Parquet, and still missing in JSONL. NaN
    and infinity of Parquet are null in JSON.

    Args:
        table: the input; `check_texts` has accepted it.
        predictions: (N,) values by column; no name is one of the table's.
        suffix: one of `FORMATS`.

    Returns:
        the file's content, and the number of its texts, column names included, that had to be changed: 0 except for
        TSV.
    """
    if suffix == ".parquet":
        return _parquet(table, predictions), 0
    records = _records(table)
    if suffix == ".jsonl":
        rows = zip(records, zip(*predictions.values(), strict=True), strict=True)
        lines = (
            _json({**record, **dict(zip(predictions, values, strict=True))}, ensure_ascii=False)
            for record, values in rows
        )
        # Python's escape of half of a surrogate pair is JSON's.
        return "".join(line + "\n" for line in lines).encode(errors="backslashreplace"), 0
    columns = [[_cell(record.get(name)) for record in records] for name in table.names]
    lines_of_cells = [[*table.names, *predictions], *zip(*columns, *predictions.values(), strict=True)]
    text = io.StringIO()
    if suffix == ".csv":
        # Quoting every text spares readers a guess: at spaces, at line breaks of all types, at NUL.
        csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(lines_of_cells)
        return text.getvalue().encode(), 0
    replaced = 0
    for cells in lines_of_cells:
        flat = [_NOT_IN_TSV.subn(" ", str(cell)) for cell in cells]
        replaced += sum(count > 0 for _, count in flat)
        text.write("\t".join(cell for cell, _ in flat) + "\n")
    return text.getvalue().encode(), replaced


def _records(table: Table) -> Sequence[Mapping[str, Any]]:
    """Return the rows as they stand in the file, each by column; in JSONL a row may lack columns."""
    if table.objects is not None:
        return table.objects
    columns = [table.column(name) for name in table.names]
    return [dict(zip(table.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _cell(value: Any) -> str | int | float:
    """Return a value as a cell of TSV or CSV: texts and numbers unchanged, null as an empty text.

    A boolean, list or object becomes JSON text, any other value of Parquet the text that `_text` returns.
    """
    if type(value) in (str, int, float):
        return value  # type: ignore[no-any-return]
    if value is None:
        return ""
    if isinstance(value, bool | list | dict | tuple):
        return _json(value, ensure_ascii=True)
    return _text(value)


def _json(value: Any, *, ensure_ascii: bool) -> str:
    """Return JSON, with null for NaN and infinity, which JSON does not have, and any other value as `_text`."""
    return json.dumps(_finite(value), ensure_ascii=ensure_ascii, default=_text, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return a value with None for numbers in it that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    """Return the text of a value of Parquet that JSON has no type for.

    It is ISO 8601 for a date or time, hexadecimal digits for bytes, and `str(value)` for others, such as a decimal
    number.
    """
    if isinstance(value, bytes):
        return value.hex()
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def _parquet(table: Table, predictions: Mapping[str, Sequence[Any]]) -> bytes:
    """Return a Parquet file of the table with the predictions behind its columns.

    Columns of Parquet input keep their types; those of other input get the type that `_arrow` chooses.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if table.arrow is not None:
        written = table.arrow()
    else:
        records = _records(table)
        written = pa.table({name: _arrow([record.get(name) for record in records]) for name in table.names})
    for name, values in predictions.items():
        column = pa.array(values)  # a table without columns would have no rows
        written = written.append_column(name, column) if written.num_columns else pa.table({name: column})
    sink = pa.BufferOutputStream()
    parquet.write_table(written, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _arrow(values: list[Any]) -> Any:
    """Return a pyarrow array of one type, nulls kept: text, boolean, float or int64 if all values are of that type.

    In other columns (mixed types, lists, objects, integers beyond 64 bits) texts stay, and other values become JSON
    text.
    """
    import pyarrow as pa

    types = {type(value) for value in values} - {type(None)}
    if (len(types) == 1 and types <= {str, bool, float}) or (types == {int} and _fit(values)):
        return pa.array(values)
    texts = (value if value is None or type(value) is str else json.dumps(value) for value in values)
    return pa.array(texts, pa.string())


def _fit(values: list[Any]) -> bool:
    return all(value is None or -(2**63) <= value < 2**63 for value in values)
