"""A table of runs and the forms it takes: terminal, Markdown, LaTeX, CSV, JSON.

Numbers meant for eyes are rounded and carry units; CSV and JSON hold them raw. Names and values come from run folders
that anyone may have written, so every form escapes what it gives a meaning to: control characters (terminal escapes,
reversed text), Markdown, HTML, TeX, and a cell that a spreadsheet would run as a formula.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_bench.console.format import format_duration, format_number, to_single_line

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.significance import Finding


@dataclass(frozen=True)
class Stat:
    """Mean of `n` values and their sample standard deviation (None for one value)."""

    mean: float
    std: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean (Student's t over seeds); None where no spread shows."""
        from lora_bench.analysis.statistics import interval_of  # late: scipy

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
        return f"{to_single_line(self.name)} {self.arrow}".strip()


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


def value_text(value: Any) -> str:
    """A config value as it is typed in an override; what is no printable text is escaped."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{to_single_line(key)}:{value_text(item)}' for key, item in value.items())}}}"
    return to_single_line(str(value)) or "''"


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
        return format_duration(stat.mean)
    return format_number(stat.mean, {"flops": "FLOP", "bytes": "B"}.get(column.kind, ""))


def visible(table: Table) -> list[Column]:
    """The columns with anything to see; `n` stands behind the metrics where a row has more than one run."""
    always = ("key", "metric")
    shown = [c for c in table.columns if c.kind in always or any(cell(row, c) for row in table.rows)]
    if any(row.n > 1 for row in table.rows):
        last = max((i for i, c in enumerate(shown) if c.kind == "metric"), default=len(shown) - 1)
        shown.insert(last + 1, Column("n", "n", keep=9))
    return shown
