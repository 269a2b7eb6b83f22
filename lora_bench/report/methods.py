"""The top of the page: what to use and why, one chart, and the table of methods that `compare` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.analysis.table import Column, format_cell, visible_columns
from lora_bench.report import specs
from lora_bench.report.blocks import bounds, column_name
from lora_bench.report.content import Cell, DataTable, Figure, Paragraph, Strong, Verdict, format_p_cell, signed

if TYPE_CHECKING:
    from lora_bench.analysis.significance import Finding
    from lora_bench.analysis.table import Table
    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Content

MAX_DRAWN = 24
"""Rows that are drawn."""
MAX_ROWS = 60
"""Rows of the table; the section of all settings has the others."""
MARK = "★"
"""Sign of the recommended setting."""


def contents(table: Table, block: Block, margin: float) -> list[Content]:
    """Return the advice, the chart and the table of one data set.

    Args:
        table: as `summarise` returns it.
        block: of this data set.
        margin: the largest difference that counts as equivalent.
    """
    sentences = block.decision.sentences if block.decision else []
    advice: list[Content] = [Paragraph(text, "lead" if i == 0 else "next") for i, text in enumerate(sentences)]
    figure = chart(block, margin)
    return [*advice, *([figure] if figure else []), *_table(table, block)]


# -- the chart --


def chart(block: Block, margin: float) -> Figure | None:
    """Return the differences from the baseline, or without tests the means; None for a single row."""
    if len(block.rows) < 2:
        return None
    tested = block.baseline is not None and any(_has_difference(entry) for entry in block.rows)
    return _differences(block, margin) if tested else _means(block)


def _differences(block: Block, margin: float) -> Figure:
    """Return each method's difference from the baseline in points, with its 95 % interval."""
    assert block.baseline is not None
    drawn = [entry for entry in block.rows if entry.is_baseline or _has_difference(entry)][:MAX_DRAWN]
    values, domain, lines = _lanes(drawn)
    for entry, value in zip(drawn, values, strict=True):
        finding = entry.row.finding
        assert finding is not None
        if entry.is_baseline:
            value |= {"value": 0.0, "low": None, "high": None, "tip": f"{entry.name}: the baseline"}
            continue
        value |= {"value": _points(finding.difference), "low": _points(finding.difference_low)}
        value |= {"high": _points(finding.difference_high)}
        interval = f"{signed(value['low'], 1)} to {signed(value['high'], 1)}"
        value["tip"] = f"{entry.name}\n{signed(value['value'], 1)} points, 95 % interval {interval}\n{finding.verdict}"
    metric = column_name(block.main)
    caption = (
        f"Points of {metric} above (right) or below the baseline, with 95 % intervals. An interval that contains 0: "
        f"either may be better. Shaded: within {_size(margin)}, which counts as equivalent."
    )
    spec = specs.interval_chart(values, domain, lines, f"points of {metric}", margin=100 * margin, signs=True)
    return Figure(
        f"Difference of {metric} from {block.baseline.name}", caption + _remarks(block, drawn), spec, style="wide"
    )


def _means(block: Block) -> Figure:
    """Return each row's mean of the main metric, with its 95 % interval over seeds."""
    drawn = [entry for entry in block.rows if entry.stat(block.main)][:MAX_DRAWN]
    values, domain, lines = _lanes(drawn)
    for entry, value in zip(drawn, values, strict=True):
        stat = entry.row.stats[block.main.name]
        low, high = bounds(stat)
        interval = "" if low is None else f"\n95 % interval {low:.4f} to {high:.4f}, {stat.n} seeds"
        value |= {"value": stat.mean, "low": low, "high": high, "tip": f"{entry.name}: {stat.mean:.4f}{interval}"}
    metric = column_name(block.main)
    caption = f"Mean {metric}; no differences were tested."
    if any(value["low"] is not None for value in values):
        caption = f"Mean {metric} with 95 % intervals over seeds (Student's t); no differences were tested."
    spec = specs.interval_chart(values, domain, lines, metric)
    return Figure(f"{metric} of each row", caption + _remarks(block, drawn), spec, style="wide")


def _lanes(drawn: list[Entry]) -> tuple[list[dict[str, Any]], list[str], int]:
    """Return the data of a chart with a lane for each entry, without the numbers; the labels; and their lines."""
    labels, lines = specs.labels(
        [entry.name for entry in drawn],
        [[f"{MARK} {entry.method}" if entry.row.recommended else entry.method, _below(entry)] for entry in drawn],
    )
    values = [
        {"label": labels[entry.name], "name": entry.name, "recommended": entry.row.recommended} for entry in drawn
    ]
    return values, [str(value["label"]) for value in values], lines


def _below(entry: Entry) -> str:
    """Return the second line of an entry's label."""
    return f"{entry.settings} (baseline)".strip() if entry.is_baseline else entry.settings


def _remarks(block: Block, drawn: list[Entry]) -> str:
    """Return the end of the caption: the sign of the recommended row, and how many rows are not drawn."""
    text = f" {MARK} Recommended." if any(entry.row.recommended for entry in drawn) else ""
    n_missing = len(block.rows) - len(drawn)
    return f"{text} {n_missing} of {len(block.rows)} rows are not drawn." if n_missing else text


def _has_difference(entry: Entry) -> bool:
    """Return whether an entry was compared with the baseline."""
    return entry.row.finding is not None and entry.row.finding.difference_low is not None


def _size(margin: float) -> str:
    """Return a margin in points, with its unit."""
    return f"{100 * margin:.3g} point{'s' * (100 * margin != 1)}"


def _points(difference: float | None) -> float | None:
    """Return a difference in points."""
    return None if difference is None else round(100 * difference, 4)


# -- the table --

_FINDING_COLUMNS = ("verdict", "difference", "95 % interval", "p (Holm)", "detects", "paired seeds")


def _table(table: Table, block: Block) -> list[Content]:
    """Return the rows that `compare` prints, with their verdicts."""
    if not block.rows:
        return []
    columns = [column for column in visible_columns(table) if not _is_of_other_data(table, block, column)]
    keys = [column for column in columns if column.format == "key"] or [Column("method", "key")]
    metrics = [column for column in columns if column.format in ("metric", "interval", "n")]
    costs = [column for column in columns if column.format not in ("key", "metric", "interval", "n")]
    metrics.sort(key=lambda column: block.main.name not in (column.name, column.of))
    tested = any(entry.row.finding for entry in block.rows)
    leading = [column for column in metrics if block.main.name in (column.name, column.of) or column.format == "n"]
    others = [column for column in metrics if column not in leading]
    header = [column.header for column in (*keys, *leading)]
    header += [*(_FINDING_COLUMNS if tested else ()), *(column.header for column in (*others, *costs))]
    rows = []
    for entry in block.rows[:MAX_ROWS]:
        name: Cell = (
            (_key(entry, keys[0]), Strong(f"{MARK} recommended")) if entry.row.recommended else _key(entry, keys[0])
        )
        cells: list[Cell] = [name, *(_key(entry, key) for key in keys[1:])]
        cells += [_number(entry, column) for column in leading]
        cells += finding_cells(entry.row.finding) if tested else []
        rows.append([*cells, *(_number(entry, column) for column in (*others, *costs))])
    marked = frozenset(i for i, entry in enumerate(block.rows[:MAX_ROWS]) if entry.row.recommended)
    caption = "One row per method, at its setting that is best on the selection split"
    if block.n_methods == 1:
        caption = "The settings of one method"
    elif len(block.rows) > block.n_methods:
        caption = "Settings that stand for their method, and others"
    contents: list[Content] = [
        DataTable(f"{caption}; the best of each metric in bold", header, rows, marked, "methods")
    ]
    if len(block.rows) > MAX_ROWS:
        note = f"The first {MAX_ROWS} of {len(block.rows):,} rows. The section “All settings” has the others."
        contents.append(Paragraph(note))
    return contents


def _is_of_other_data(table: Table, block: Block, column: Column) -> bool:
    """Return whether rows of other data have values of a metric, and those of this block have none."""
    if column.format not in ("metric", "interval"):
        return False
    name = column.of or column.name
    return any(name in row.stats for row in table.rows) and not any(name in entry.row.stats for entry in block.rows)


def _key(entry: Entry, key: Column) -> str:
    """Return the cell of a key column; a table without such columns has the entry's name."""
    return format_cell(entry.row, key) if key.name in entry.row.keys else entry.name if key.name == "method" else ""


def _number(entry: Entry, column: Column) -> Cell:
    """Return a cell as `compare` prints it; the best value of a metric is bold."""
    text = format_cell(entry.row, column)
    return Strong(text) if text and column.name in entry.row.best else text


def finding_cells(finding: Finding | None) -> list[Cell]:
    """Return the cells of `_FINDING_COLUMNS`, differences as fractions; an unknown value is an empty cell."""
    if finding is None:
        return [""] * len(_FINDING_COLUMNS)
    interval = ""
    if finding.difference_low is not None:
        interval = f"{signed(finding.difference_low)} to {signed(finding.difference_high)}"
    detectable = "" if finding.detectable is None else f"{finding.detectable:.4f}"
    seeds = "" if finding.paired_seeds is None else str(finding.paired_seeds)
    return [
        Verdict(finding.verdict),
        signed(finding.difference),
        interval,
        format_p_cell(finding.p_holm),
        detectable,
        seeds,
    ]
