"""A table of runs: rows, columns, notes, and the texts of its cells.

The forms it takes (terminal, Markdown, LaTeX, CSV, JSON, HTML) are elsewhere. Numbers in a cell are rounded and have
units; CSV and JSON hold them raw. Names and values come from run folders that anyone may have written, so every form
escapes what has a meaning in it: control characters (terminal escapes, reversed text), Markdown, HTML, TeX, and cells
that a spreadsheet would run as a formula.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.significance import BASELINE
from lora_bench.console.format import format_duration, format_number, to_single_line

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.analysis.decision import Decision
    from lora_bench.analysis.significance import Finding


@dataclass(frozen=True)
class Stat:
    """The mean of `n` values and their sample standard deviation (None for one value)."""

    mean: float
    std: float | None
    n: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean (Student's t over seeds); None where no spread shows."""
        from lora_bench.analysis.statistics import interval_from_std  # late: scipy

        bounds = interval_from_std(self.mean, self.std, self.n)
        return None if bounds.low is None or bounds.high is None else (bounds.low, bounds.high)


@dataclass(frozen=True)
class Column:
    """A column: its header and the format of its cells."""

    name: str
    """The header: a configuration key, a metric, or a key of run.json."""
    format: str
    """The format of its cells: `key`, `text`, `metric`, `interval`, `count`, `seconds`, `flops`, `bytes` or `n`."""
    arrow: str = ""
    """For a metric: ↑ if higher is better, ↓ if lower is."""
    keep: int = 0
    """Priority in a narrow terminal: columns with the smallest number are dropped first; keys never."""
    of: str = ""
    """For an interval: the name of its metric's column."""

    @property
    def header(self) -> str:
        """The name with the arrow."""
        return f"{to_single_line(self.name)} {self.arrow}".strip()


@dataclass(frozen=True)
class Row:
    """A row: one setting, that is, runs that are equal except for the seed."""

    keys: dict[str, Any]
    """Values of the key columns; a key that these runs do not have is absent."""
    stats: dict[str, Stat]
    """Mean and spread by column; a column that the runs have no value for is absent."""
    n: int
    """Number of runs."""
    folders: list[Path]
    best: frozenset[str] = frozenset()
    """Metrics in which no comparable row is better."""
    data: str | None = None
    """The identity of the data, the form of task and the main metric; rows are comparable if it is equal."""
    measure: str = "mcc"
    """The metric that is tested: that of `--measure`, else the main metric of the runs."""
    split: str = "validation"
    """The reported split that is tested."""
    finding: Finding | None = None
    """The test against the baseline."""
    saved: dict[str, float] | None = None
    """Shares of full fine-tuning's FLOPs, by cause."""
    method: int = 0
    """Number of the method, which other settings of the table share that differ in tuned hyperparameters only."""
    chosen: bool = True
    """The setting stands for its method: it is the best one on the selection split."""
    recommended: bool = False
    """The setting that the table's advice is to use."""
    unlearned: int = 0
    """Number of runs that learned nothing."""

    @property
    def learned(self) -> bool:
        """Return whether at least half of the runs learned something."""
        return 2 * self.unlearned <= self.n

    @property
    def is_baseline(self) -> bool:
        """Return whether the other rows on the data are tested against this one."""
        return self.finding is not None and self.finding.verdict == BASELINE


@dataclass(frozen=True)
class Missing:
    """A run that is not done, or a folder that cannot be read, with the reason that it is not in the table."""

    status: str
    """A status of run.json, `killed` or `skipped`."""
    folder: Path
    reason: str
    overrides: str = ""
    """The run's overrides as one text."""

    @property
    def line(self) -> str:
        """The entry as a line of text."""
        return f"{self.status}: {self.folder}{f' ({self.overrides})' * bool(self.overrides)}: {self.reason}"


@dataclass(frozen=True)
class Table:
    """Rows of finished runs, the recommended one first and then by main metric, with notes and side tables."""

    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    """Caveats."""
    missing: list[Missing] = field(default_factory=list)
    records: dict[Path, dict[str, Any]] = field(default_factory=dict)
    """`run.json` of every run below the given folders, in the table or missing."""
    # Side tables of texts: the tests and savings of the rows, and published results.
    tests: Table | None = None
    savings: Table | None = None
    published: Table | None = None
    settings: list[Row] = field(default_factory=list)
    """Rows of all settings, those included that do not stand for their method."""
    decisions: list[Decision] = field(default_factory=list)
    """What to use, for each data set."""

    @property
    def side_tables(self) -> list[Table]:
        """The tables to print after this one."""
        return [table for table in (self.tests, self.savings, self.published) if table is not None]

    @property
    def footnotes(self) -> list[str]:
        """The lines to print below the table: notes, then missing runs."""
        return [*self.notes, *(missing.line for missing in self.missing)]

    @property
    def advice(self) -> list[str]:
        """The sentences to end with: what to use and why, and what to run next; with the data's name if several."""
        return [sentence for decision in self.decisions for sentence in decision.sentences]

    @property
    def keys(self) -> list[Column]:
        """The key columns."""
        return [column for column in self.columns if column.format == "key"]

    def label(self, row: Row, group: str = "") -> str:
        """Return a row's name: its key columns as overrides, `adapter=lora adapter.rank=8`.

        Args:
            row: of this table.
            group: take only the keys of this configuration group; empty: all.
        """
        keys = [key for key in self.keys if key.name in row.keys and group in ("", key.name.split(".")[0])]
        return " ".join(f"{to_single_line(key.name)}={format_value(row.keys[key.name])}" for key in keys)


def format_value(value: Any) -> str:
    """Return a configuration value as it is typed in an override; characters that cannot be printed are escaped."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{to_single_line(key)}:{format_value(item)}' for key, item in value.items())}}}"
    return to_single_line(str(value)) or "''"


def format_cell(row: Row, column: Column, digits: int = 4) -> str:
    """Return the text of a cell: rounded to `digits`, with its unit; empty if the row has no value."""
    if column.format in ("key", "text"):
        return format_value(row.keys[column.name]) if column.name in row.keys else ""
    if column.format == "n":
        return str(row.n)
    stat = row.stats.get(column.of or column.name)
    if stat is None:
        return ""
    if column.format == "interval":
        return "{:.{d}f} to {:.{d}f}".format(*stat.interval, d=digits) if stat.interval else ""
    if column.format == "metric":
        spread = "" if stat.std is None else f" ± {stat.std:.{digits}f}"
        fewer = "" if stat.n == row.n else f" (n={stat.n})"
        return f"{stat.mean:.{digits}f}{spread}{fewer}"
    if column.format == "seconds":
        return format_duration(stat.mean)
    return format_number(stat.mean, {"flops": "FLOP", "bytes": "B"}.get(column.format, ""))


def visible_columns(table: Table) -> list[Column]:
    """Return the columns to show: all key and metric columns, and each other column in which a row has a value.

    If a row has more than one run, a column `n` is inserted after the metrics.
    """
    always = ("key", "metric")
    columns = [c for c in table.columns if c.format in always or any(format_cell(row, c) for row in table.rows)]
    if any(row.n > 1 for row in table.rows):
        last = max((i for i, c in enumerate(columns) if c.format == "metric"), default=len(columns) - 1)
        columns.insert(last + 1, Column("n", "n", keep=9))
    return columns
