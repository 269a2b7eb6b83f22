"""The baseline of a table: which row the others are tested against, and the notes about the tests.

`add_verdicts` is what `lora-bench compare` calls; `significance` has the tests.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.significance import (
    BASELINE,
    MARGIN,
    NOT_TESTED,
    Finding,
    best_experiment,
    compare_with_baseline,
    mean_selection_mcc,
    row_label,
)
from lora_bench.analysis.table import Column, Row, Table, format_value
from lora_bench.config.metric_names import display_name
from lora_bench.errors import Code, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

FEW_RUNS = 200
"""Finished runs up to which a table is tested without `--baseline`; the predictions of more take long to read."""


def add_verdicts(
    table: Table,
    split: str,
    baseline: str | None = None,
    margin: float = MARGIN,
    measure: str = "mcc",
    *,
    always: bool = False,
) -> Table:
    """Return the table with a `Finding` in its rows, the tests as a side table, and notes about them.

    Rows on the same data are tested against one baseline of theirs.

    Args:
        table: rows, and the records of their runs.
        split: the split whose predictions are compared.
        baseline: the name of the baseline (`_named_rows`); None takes full fine-tuning, else plain LoRA, else the best
            row.
        margin: the largest difference that counts as equivalent.
        measure: the metric to test, of `MAIN_METRICS`.
        always: also test more than `FEW_RUNS` runs without a named baseline.

    Raises:
        UserError: `baseline` matches no row.
    """
    rows_by_data: dict[str | None, list[int]] = {}
    for i, row in enumerate(table.rows):
        rows_by_data.setdefault(row.data, []).append(i)
    n_runs = sum(row.n for row in table.rows)
    if baseline is None and (max(map(len, rows_by_data.values()), default=0) < 2 or (n_runs > FEW_RUNS and not always)):
        note = f"{n_runs:,} runs are tested only against a named row: give --baseline NAME"
        return replace(table, notes=[*table.notes, note]) if n_runs > FEW_RUNS else table
    named_rows = None if baseline is None else _named_rows(table, baseline)
    rows, notes = list(table.rows), []
    for row_numbers in rows_by_data.values():
        candidates, reason = _candidates(table, row_numbers, named_rows)
        if len(row_numbers) < 2 or not candidates:
            continue
        chosen = max(candidates, key=lambda i: mean_selection_mcc(table, table.rows[i].folders))
        rivals = [i for i in row_numbers if i != chosen]
        name = row_label(table, table.rows[chosen])
        tests = compare_with_baseline(
            table, table.rows[chosen], [table.rows[i] for i in rivals], split, margin, measure
        )
        rows[chosen] = replace(rows[chosen], finding=Finding(name, BASELINE, measure))
        for i, finding in zip(rivals, tests, strict=True):
            rows[i] = replace(rows[i], finding=finding)
        subject = f"{split} {display_name(measure)} against {name}"
        notes += _notes(subject, reason if len(candidates) == 1 else f"{reason}, the best on selection", tests, margin)
        notes += _selected_experiments(table, [table.rows[i] for i in row_numbers])
    for i, row in enumerate(rows):
        if row.finding is None and notes:
            rows[i] = replace(row, finding=Finding("", NOT_TESTED, measure, "no baseline has the same data"))
    tested = replace(table, rows=rows, notes=[*notes, *table.notes])
    return replace(tested, tests=_readable_tests(tested, measure)) if notes else table


# -- the baseline --


def _named_rows(table: Table, name: str) -> set[int]:
    """Return the numbers of the rows that `name` matches.

    Args:
        table: the rows.
        name: the folder of a run or one above it, `key=value,key=value`, or a value alone (`full`).

    Raises:
        UserError: it matches no row.
    """
    folder = Path(name)
    if folder.is_dir():
        matches = [
            i for i, row in enumerate(table.rows) if any(_is_below(run_folder, folder) for run_folder in row.folders)
        ]
    else:
        conditions = re.split(r",(?=\s*[\w./]+=)", name)
        matches = [
            i
            for i, row in enumerate(table.rows)
            if all(_matches(table, row, condition.strip()) for condition in conditions)
        ]
    if not matches:
        values = {format_value(value) for row in table.rows for value in row.keys.values()}
        remedy = nearest(name, values | {row_label(table, row) for row in table.rows}) if len(table.rows) <= 20 else ""
        raise UserError(
            "matches no row of this table", key="--baseline", value=name, remedy=remedy, code=Code.UNKNOWN_CHOICE
        )
    return set(matches)


def _is_below(folder: Path, parent: Path) -> bool:
    """Return whether a folder is `parent` or lies below it."""
    parent = parent.resolve()
    return parent in (folder.resolve(), *folder.resolve().parents)


def _matches(table: Table, row: Row, condition: str) -> bool:
    """Return whether a row has `key=value` among its choices and key columns, or a value alone."""
    key, _, expected = condition.rpartition("=")
    key_texts = {name: format_value(value) for name, value in row.keys.items()}
    values = {name: str(choice) for name, choice in _first_record(table, row)["choices"].items()} | key_texts
    return values.get(key.strip()) == expected.strip() if key else expected in values.values()


def _candidates(table: Table, row_numbers: Sequence[int], named_rows: set[int] | None) -> tuple[list[int], str]:
    """Return the rows of one data set that may be its baseline, and the reason to tell the user."""
    if named_rows is not None:
        return [i for i in row_numbers if i in named_rows], "--baseline"
    for adapter, reason in (("full", "full fine-tuning"), ("lora", "plain LoRA")):
        matches = [i for i in row_numbers if _first_record(table, table.rows[i])["choices"].get("adapter") == adapter]
        if matches:
            return matches, f"{reason}, unless --baseline names another"
    best = max(row_numbers, key=lambda i: mean_selection_mcc(table, table.rows[i].folders))
    if mean_selection_mcc(table, table.rows[best].folders) > -math.inf:
        return [best], "best on selection, unless --baseline names another"
    return [row_numbers[0]], "best on these same scores, which flatters it, unless --baseline names another"


def _first_record(table: Table, row: Row) -> dict[str, Any]:
    """Return the record of a row's first run."""
    return table.records[row.folders[0]]


# -- notes and the table of tests --


def _notes(subject: str, reason: str, tests: Sequence[Finding], margin: float) -> list[str]:
    """Return the notes about the tests of one data set: baseline, seeds, examples, power, and rows without a test."""
    subject_line = f"verdicts: {subject} ({reason})"
    decided = [test for test in tests if test.p_holm is not None]
    lines = []
    if decided:
        seeds = sorted({test.paired_seeds for test in decided if test.paired_seeds})
        n_seeds = f"{seeds[0]}" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]}"
        weakest = min(test.power for test in decided if test.power is not None)
        lines.append(
            f"{subject_line}: {n_seeds} paired seeds and {decided[0].examples:,} examples, both counted as chance; p "
            f"by Holm over {len(decided)} rival{'s' * (len(decided) > 1)}; within {margin:g} is equivalent (--margin)"
        )
        lines.append(f"power: a true difference of {margin:g} is detected with a probability of {weakest:.0%} or more")
    else:
        lines.append(f"{subject_line}: no row could be tested")
    details_by_reason: dict[str, list[str]] = {}
    for test in tests:
        if test.why:
            cause, _, detail = test.why.partition(": ")
            details_by_reason.setdefault(cause, []).append(detail)
    for cause, details in details_by_reason.items():
        rest = f" and {len(details) - 1} more" if len(details) > 1 else ""
        example = f": {details[0]}{rest}" if details[0] else ""
        lines.append(f"{len(details)} of {len(tests)} rows: {cause}{example}")
    return lines


def _selected_experiments(table: Table, rows: Sequence[Row]) -> list[str]:
    """Return a note for each row of several experiments: which of them was tested."""
    lines = []
    for row in rows:
        best = best_experiment(table, row)
        if len(best) < row.n:
            overrides = " ".join(str(x) for x in table.records[best[0]]["overrides"] if not str(x).startswith("seed="))
            lines.append(
                f"{row_label(table, row)}: only its experiment with the best selection MCC is tested: {overrides}"
            )
    return lines


_KEEP_BY_COLUMN = {
    "difference": 5,
    "95 % interval": 4,
    "p (Holm)": 3,
    "effect size": 0,
    "power": 1,
    "seeds": 2,
    "verdict": 6,
}
"""Columns of the table of tests, with their `Column.keep`."""


def _readable_tests(table: Table, measure: str) -> Table:
    """Return the findings as a table of texts, a row for each row of `table`."""
    columns = [
        *table.keys,
        *(Column(_header(name, measure), "text", keep=keep) for name, keep in _KEEP_BY_COLUMN.items()),
    ]
    rows = [replace(row, keys=row.keys | _finding_texts(row.finding), n=1) for row in table.rows if row.finding]
    return Table(columns, rows)


def _header(name: str, measure: str) -> str:
    """Return the header of a column; a difference is one of the tested metric."""
    return f"{measure} difference" if name == "difference" else name


def _finding_texts(finding: Finding) -> dict[str, str]:
    """Return the cells of a finding by column; a value that is None has no cell."""
    texts = {"verdict": finding.verdict}
    if finding.difference is not None:
        texts[_header("difference", finding.measure)] = f"{finding.difference:+.4f}"
        texts["95 % interval"] = f"{finding.difference_low:+.4f} to {finding.difference_high:+.4f}"
        texts["seeds"] = str(finding.paired_seeds)
    if finding.p_holm is not None:
        texts["p (Holm)"] = "<0.001" if finding.p_holm < 0.001 else f"{finding.p_holm:.3f}"
    if finding.effect_size is not None:
        texts["effect size"] = f"{finding.effect_size:+.2f}"
    if finding.power is not None:
        texts["power"] = f"{finding.power:.0%}"
    return texts
