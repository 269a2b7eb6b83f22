"""A table as JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.table import Column, Row, Table, format_cell, visible_columns
from lora_bench.console.format import to_single_line

if TYPE_CHECKING:
    from collections.abc import Iterator


def _rows_of_values(table: Table) -> Iterator[dict[str, Any]]:
    """Yield the raw values of each row by name: keys, n, metrics with spread and interval, costs, savings, finding.

    The names of savings and of a finding's fields begin with `savings.` and `tests.`, so that none is that of a metric.
    """
    finding_fields = next((asdict(row.finding) for row in table.rows if row.finding), {})
    saved_names = dict.fromkeys(name for row in table.rows for name in row.saved or ())
    for row in table.rows:
        values: dict[str, Any] = {column.name: row.keys.get(column.name) for column in table.keys}
        values["n"] = row.n
        for column in table.columns:
            if column.format == "text":
                values[column.name] = row.keys.get(column.name)
            elif column.format not in ("key", "interval"):
                stat = row.stats.get(column.name)
                mean = stat.mean if stat else None
                values[column.name] = int(mean) if mean and column.format != "metric" and mean.is_integer() else mean
                if column.format == "metric":
                    low, high = (stat.interval if stat else None) or (None, None)
                    values[f"{column.name}_std"] = stat.std if stat else None
                    values |= {f"{column.name}_low": low, f"{column.name}_high": high}
        values |= {f"savings.{name}": (row.saved or {}).get(name) for name in saved_names}
        finding = asdict(row.finding) if row.finding else dict.fromkeys(finding_fields)
        values |= {f"tests.{name}": value for name, value in finding.items()}
        values |= {"chosen": row.chosen, "recommended": row.recommended, "learned_nothing": row.unlearned}
        yield values | {"runs": [str(folder) for folder in row.folders]}


def to_json(table: Table) -> str:
    """Return the table as a JSON list of objects with raw values, one per row."""
    return json.dumps(list(_rows_of_values(table)), indent=2, allow_nan=False) + "\n"


def to_csv(table: Table) -> str:
    """Return the table as CSV (RFC 4180) with a header row.

    A missing value is an empty cell; a configured null is `null`. A cell has one value: p values by seed and folders
    are in JSON only. Cells cannot be read as formulas.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    lines = [{name: value for name, value in line.items() if name not in _LISTS} for line in _rows_of_values(table)]
    for line, row in zip(lines, table.rows, strict=True):
        line |= {column.name: format_cell(row, column) for column in table.keys}
    if lines:
        writer.writerow(_no_formula(to_single_line(name)) for name in lines[0])
        writer.writerows(
            [_no_formula("" if value is None else _to_text(value)) for value in line.values()] for line in lines
        )
    return out.getvalue()


_LISTS = ("runs", "tests.p_bootstrap", "tests.p_mcnemar")
"""Values that are lists."""


def _to_text(value: Any) -> str:
    """Return a value as the text of a cell."""
    return to_single_line(json.dumps(value) if isinstance(value, bool) else str(value))


# Characters, also in full width, that make a spreadsheet run a cell as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _no_formula(cell: str) -> str:
    """Return the text of a cell; one that a spreadsheet would run as a formula gets an apostrophe in front."""
    if not cell.lstrip(" ").startswith(_FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def to_markdown(table: Table) -> str:
    """Return the table, its side tables, footnotes and advice as Markdown."""
    footnotes = "".join(f"- {_markdown(to_single_line(line))}\n" for line in table.footnotes)
    advice = "".join(f"**{_markdown(to_single_line(line))}**\n" for line in table.advice)
    return "\n".join(filter(None, [*map(_markdown_grid, (table, *table.side_tables)), footnotes, advice]))


def _markdown_grid(table: Table) -> str:
    """Return one table as Markdown; an empty text if it has no rows."""
    columns = visible_columns(table)
    lines = []
    if table.rows:
        lines.append([_markdown(column.header) for column in columns])
        lines.append(["---" if column.format == "key" else "---:" for column in columns])
    for row in table.rows:
        cells = [_markdown(format_cell(row, column)) for column in columns]
        lines.append([f"**{x}**" if x and _is_bold(row, c) else x for x, c in zip(cells, columns, strict=True)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _is_bold(row: Row, column: Column) -> bool:
    """Return whether a cell is bold: the best value of a metric, or a key of the recommended row."""
    return row.recommended if column.format == "key" else column.name in row.best


def _markdown(text: str) -> str:
    """Return a text with Markdown's special characters escaped."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    # An underscore inside a word (train_size) has no meaning and stays, so that the header can be pasted.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def to_latex(table: Table) -> str:
    """Return the table and its side tables as `tabular` of the booktabs package, with footnotes as comments."""
    columns = visible_columns(table)
    align = "".join("l" if column.format == "key" else "r" for column in columns)
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines += [" & ".join(_latex(column.header) for column in columns) + r" \\", r"\midrule"]
    for row in table.rows:
        cells = [_latex(format_cell(row, column)) for column in columns]
        cells = [rf"\textbf{{{x}}}" if x and _is_bold(row, c) else x for x, c in zip(cells, columns, strict=True)]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    side_tables = [to_latex(side_table).rstrip("\n") for side_table in table.side_tables]
    comments = [f"% {to_single_line(line)}" for line in (*table.footnotes, *table.advice)]
    return "\n".join([*lines, *side_tables, *comments]) + "\n"


_LATEX = {char: "\\" + char for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a row's \\ a bare bracket would be its argument
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
}


def _latex(text: str) -> str:
    """Return a text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(char, char) for char in text)
