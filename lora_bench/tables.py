"""A table of runs and the forms it takes: terminal, Markdown, LaTeX, CSV, JSON.

Numbers meant for eyes are rounded and carry units; CSV and JSON hold them raw. Names and values come from run folders
that anyone may have written, so every form escapes what it gives a meaning to: control characters (terminal escapes,
reversed text), Markdown, HTML, TeX, and a cell that a spreadsheet would run as a formula.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_bench.comparison import Finding


@dataclass(frozen=True)
class Stat:
    """Mean of `n` values and their sample standard deviation (None for one value)."""

    mean: float
    std: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean (Student's t over seeds); None where no spread shows."""
        from lora_bench.stats import interval_of  # late: scipy

        found = interval_of(self.mean, self.std, self.n)
        return None if found.low is None or found.high is None else (found.low, found.high)


@dataclass(frozen=True)
class Column:
    name: str
    """A config key, a metric, or a key of run.json: the header."""
    kind: str
    """`key`, `text`, `metric`, `interval`, `count`, `seconds`, `flops` or `bytes`: how its cells are shown."""
    arrow: str = ""
    """Of a metric: ↑ where more is better, ↓ where less is."""
    keep: int = 0
    """In a narrow terminal the column with the smallest number goes first; keys stay."""
    of: str = ""
    """Of an interval: the metric."""

    @property
    def header(self) -> str:
        return f"{clean(self.name)} {self.arrow}".strip()


@dataclass(frozen=True)
class Row:
    keys: dict[str, Any]
    """Values of the key columns; a key that these runs do not have is absent."""
    stats: dict[str, Stat]
    n: int
    """How many runs the row stands for."""
    folders: list[Path]
    best: frozenset[str] = frozenset()
    """Metrics in which no comparable row is better."""
    data: str | None = None
    """What is equal for comparable rows."""
    finding: Finding | None = None
    """Whether it differs from the baseline."""
    saved: dict[str, float] | None = None
    """Shares of full fine-tuning's FLOPs, by cause."""


@dataclass(frozen=True)
class Missing:
    """A run that is not done, or a folder that cannot be read: not in the table, and why."""

    status: str
    """A status of run.json, `killed` or `skipped`."""
    folder: Path
    reason: str
    asked: str = ""
    """Its overrides."""

    @property
    def line(self) -> str:
        return f"{self.status}: {self.folder}{f' ({self.asked})' * bool(self.asked)}: {self.reason}"


@dataclass(frozen=True)
class Table:
    """Rows of finished runs, best first, and what has to be said below them."""

    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    """Caveats."""
    missing: list[Missing] = field(default_factory=list)
    records: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """`run.json` of every run that was found, in the table or missing."""
    tests: Table | None = None  # findings and savings of the rows, and published figures, for people
    savings: Table | None = None
    anchors: Table | None = None

    @property
    def beside(self) -> list[Table]:
        """The tables that come after this one."""
        return [each for each in (self.tests, self.savings, self.anchors) if each is not None]

    @property
    def below(self) -> list[str]:
        """What stands below the table, one line each."""
        return [*self.notes, *(missing.line for missing in self.missing)]

    @property
    def keys(self) -> list[Column]:
        return [column for column in self.columns if column.kind == "key"]


def clean(text: str) -> str:
    """`text` on one line without control characters: a terminal escape shows as \\x1b."""
    return "".join(
        char if char.isprintable() else " " if char.isspace() else char.encode("unicode_escape").decode()
        for char in unicodedata.normalize("NFC", text)
    )


def value_text(value: Any) -> str:
    """A config value as it is typed in an override; what is no printable text is escaped."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{clean(key)}:{value_text(item)}' for key, item in value.items())}}}"
    return clean(str(value)) or "''"


def human(value: float, unit: str = "") -> str:
    """A number of at most three digits with a prefix of the thousands: 1.3 M, 540 MB."""
    sizes = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    prefix = next((name for name, size in sizes.items() if abs(value) >= 0.9995 * size), "")
    scaled = value / sizes.get(prefix, 1)
    return f"{scaled:.{1 if prefix and abs(scaled) < 9.95 else 0}f} {prefix}{unit}".strip()


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def cell(row: Row, column: Column, digits: int = 4) -> str:
    """A value for eyes: rounded, with its unit."""
    if column.kind in ("key", "text"):
        return value_text(row.keys[column.name]) if column.name in row.keys else ""
    if column.kind == "n":
        return str(row.n)
    stat = row.stats.get(column.of or column.name)
    if stat is None:
        return ""
    if column.kind == "interval":
        return "{:.{d}f} to {:.{d}f}".format(*stat.interval, d=digits) if stat.interval else ""
    if column.kind == "metric":
        spread = "" if stat.std is None else f" ± {stat.std:.{digits}f}"
        fewer = "" if stat.n == row.n else f" (n={stat.n})"
        return f"{stat.mean:.{digits}f}{spread}{fewer}"
    if column.kind == "seconds":
        return duration(stat.mean)
    return human(stat.mean, {"flops": "FLOP", "bytes": "B"}.get(column.kind, ""))


def visible(table: Table) -> list[Column]:
    """The columns with anything to see; `n` stands behind the metrics where a row has more than one run."""
    always = ("key", "metric")
    shown = [c for c in table.columns if c.kind in always or any(cell(row, c) for row in table.rows)]
    if any(row.n > 1 for row in table.rows):
        last = max((i for i, c in enumerate(shown) if c.kind == "metric"), default=len(shown) - 1)
        shown.insert(last + 1, Column("n", "n", keep=9))
    return shown


# -- CSV and JSON: raw numbers --


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
        writer.writerow(_no_formula(clean(name)) for name in lines[0])
        writer.writerows(
            [_no_formula("" if value is None else _flat(value)) for value in line.values()] for line in lines
        )
    return out.getvalue()


def _flat(value: Any) -> str:
    return clean(" ".join(map(str, value)) if isinstance(value, list) else str(value))


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


# -- Markdown and LaTeX --


def to_markdown(table: Table) -> str:
    below = "".join(f"- {_markdown(clean(line))}\n" for line in table.below)
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
    return "\n".join([*lines, *beside, *(f"% {clean(line)}" for line in table.below)]) + "\n"


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
