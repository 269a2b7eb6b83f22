"""A table as JSON, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.table import Table, cell, visible
from lora_bench.console.format import to_single_line

if TYPE_CHECKING:
    from collections.abc import Iterator


def _raw(table: Table) -> Iterator[dict[str, Any]]:
    found = next((asdict(row.finding) for row in table.rows if row.finding), {})
    over_seeds = any(column.kind == "interval" for column in table.columns)
    saved = dict.fromkeys(name for row in table.rows for name in row.saved or ())
    for row in table.rows:
        line: dict[str, Any] = {column.name: row.keys.get(column.name) for column in table.keys}
        line["n"] = row.n
        for column in table.columns:
            if column.kind not in ("key", "interval"):
                stat = row.stats.get(column.name)
                mean = stat.mean if stat else None
                line[column.name] = int(mean) if mean and column.kind != "metric" and mean.is_integer() else mean
                if column.kind == "metric":
                    low, high = (stat.interval if stat and over_seeds else None) or (None, None)
                    line[f"{column.name}_std"] = stat.std if stat else None
                    line |= {f"{column.name}_low": low, f"{column.name}_high": high}
        line |= {name: (row.saved or {}).get(name) for name in saved}
        line |= asdict(row.finding) if row.finding else dict.fromkeys(found)
        yield line | {"runs": [str(folder) for folder in row.folders]}


def to_json(table: Table) -> str:
    return json.dumps(list(_raw(table)), indent=2, allow_nan=False) + "\n"


def to_csv(table: Table) -> str:
    """RFC 4180 with a header row; an empty cell where there is no value, `null` where the config says null."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    lines = [{name: value for name, value in line.items() if name != "runs"} for line in _raw(table)]
    for line, row in zip(lines, table.rows, strict=True):
        line |= {column.name: cell(row, column) for column in table.keys}
    if lines:
        writer.writerow(_no_formula(to_single_line(name)) for name in lines[0])
        writer.writerows(
            [_no_formula("" if value is None else _flat(value)) for value in line.values()] for line in lines
        )
    return out.getvalue()


def _flat(value: Any) -> str:
    return to_single_line(" ".join(map(str, value)) if isinstance(value, list) else str(value))


# What makes a spreadsheet run a cell as a formula, in full width too.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _no_formula(cell: str) -> str:
    if not cell.lstrip(" ").startswith(_FORMULA):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def to_markdown(table: Table) -> str:
    below = "".join(f"- {_markdown(to_single_line(line))}\n" for line in table.below)
    return "\n".join(part for part in (*map(_markdown_grid, (table, *table.beside)), below) if part)


def _markdown_grid(table: Table) -> str:
    columns = visible(table)
    lines = []
    if table.rows:
        lines.append([_markdown(column.header) for column in columns])
        lines.append(["---" if column.kind == "key" else "---:" for column in columns])
    for row in table.rows:
        cells = [_markdown(cell(row, column)) for column in columns]
        lines.append([f"**{x}**" if c.name in row.best else x for x, c in zip(cells, columns, strict=True)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    # An underscore inside a word (train_size) has no meaning and stays, so that the header can be pasted.
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)


def to_latex(table: Table) -> str:
    """A `tabular` for the booktabs package; what stands below the table comes as comments."""
    columns = visible(table)
    align = "".join("l" if column.kind == "key" else "r" for column in columns)
    lines = [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines += [" & ".join(_latex(column.header) for column in columns) + r" \\", r"\midrule"]
    for row in table.rows:
        cells = [_latex(cell(row, column)) for column in columns]
        cells = [rf"\textbf{{{x}}}" if c.name in row.best else x for x, c in zip(cells, columns, strict=True)]
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    beside = [to_latex(each).rstrip("\n") for each in table.beside]
    return "\n".join([*lines, *beside, *(f"% {to_single_line(line)}" for line in table.below)]) + "\n"


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
    return "".join(_LATEX.get(char, char) for char in text)
