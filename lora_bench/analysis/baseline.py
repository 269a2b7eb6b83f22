"""The baseline of a table: which row the others are tested against, and the notes about the tests.

`add_verdicts` is what `lora-bench compare` calls; `significance` has the tests.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.settings import have_enough_seeds, mean_selection_score
from lora_bench.analysis.significance import BASELINE, MARGIN, NOT_TESTED, Finding, compare_with_baseline
from lora_bench.analysis.table import Column, Row, Table, format_value
from lora_bench.config.metric_names import display_name
from lora_bench.errors import Code, UserError, nearest
from lora_bench.records.run_names import choose_run, match_runs
from lora_bench.records.stored_run import StoredRun

if TYPE_CHECKING:
    from collections.abc import Sequence

FEW_RUNS = 200
"""Runs of chosen settings that are tested without `--baseline`; the predictions of more take long to read."""


def add_verdicts(table: Table, baseline: str | list[str] | None = None, margin: float = MARGIN) -> Table:
    """Return the table with a `Finding` in the rows of chosen settings, and notes about the tests.

    The methods on one data set, each with its chosen setting, are tested against one baseline of theirs, by the metric
    of their rows (`Row.measure`) on their split (`Row.split`).

    Args:
        table: rows of all settings, and the records of their runs.
        baseline: the name of the baseline (`_named_rows`), which may be a setting that is not chosen, or several names,
            of whose rows one is chosen (`_candidates`); None takes full fine-tuning, else plain LoRA, else the method
            that is best on the selection split.
        margin: the largest difference that counts as equivalent.

    Raises:
        UserError: `baseline` matches no row.
    """
    rows_by_data: dict[str | None, list[int]] = {}
    for i, row in enumerate(table.rows):
        rows_by_data.setdefault(row.data, []).append(i)
    named_rows = None if baseline is None else _named_rows(table, [baseline] if isinstance(baseline, str) else baseline)
    n_runs = sum(row.n for row in table.rows if row.chosen)
    if baseline is None and n_runs > FEW_RUNS:
        note = f"no tests: {n_runs:,} runs are tested only against a baseline that you name (--baseline NAME)"
        return replace(table, notes=[*table.notes, note])
    rows, notes = list(table.rows), []
    for row_numbers in rows_by_data.values():
        candidates, reason = _candidates(table, row_numbers, named_rows)
        measure, split = rows[row_numbers[0]].measure, rows[row_numbers[0]].split
        chosen_rows = [i for i in row_numbers if rows[i].chosen]
        if not candidates and named_rows is None and len(chosen_rows) > 1:
            finding = Finding("", NOT_TESTED, measure, "no chosen setting learned the task")
            rows = [replace(row, finding=finding) if i in chosen_rows else row for i, row in enumerate(rows)]
            notes.append(
                f"verdicts: {split} {display_name(measure)}: no row is tested, since no chosen setting learned the task"
            )
        if not candidates:
            continue
        chosen = max(candidates, key=lambda i: _selection_score(table, table.rows[i]))
        rivals = [i for i in chosen_rows if i != chosen]
        if not rivals:
            continue
        name = table.label(table.rows[chosen])
        tests = compare_with_baseline(
            table, table.rows[chosen], [table.rows[i] for i in rivals], split, margin, measure
        )
        rows[chosen] = replace(rows[chosen], finding=Finding(name, BASELINE, measure))
        for i, finding in zip(rivals, tests, strict=True):
            rows[i] = replace(rows[i], finding=finding)
        subject = f"{split} {display_name(measure)} against {name}"
        reason += "" if len(candidates) == 1 else ", the best of them on selection"
        reason += "; --baseline names another" if named_rows is None else ""
        notes += _notes(subject, reason, tests, margin)
    for i, row in enumerate(rows):
        if row.finding is None and row.chosen and notes:
            rows[i] = replace(row, finding=Finding("", NOT_TESTED, row.measure, "no baseline has the same data"))
    return replace(table, rows=rows, notes=[*notes, *table.notes]) if notes else table


def _selection_score(table: Table, row: Row) -> float:
    """Return the mean main metric of a row's runs on the selection split; -inf if one has none."""
    return mean_selection_score([table.records[folder] for folder in row.folders])


# -- the baseline --


def _named_rows(table: Table, names: Sequence[str]) -> set[int]:
    """Return the numbers of the rows that at least one of some names matches.

    Args:
        table: the rows.
        names: each the folder of a run or one above it, `key=value,key=value`, a value alone (`full`), or the name or
            the first digits of the id of runs in the table.

    Raises:
        UserError: none matches a row.
    """
    folders = {Path(name).resolve() for name in names if Path(name).is_dir()}
    matches = {i for i, row in enumerate(table.rows) if any(_is_below(folder, folders) for folder in row.folders)}
    for name in names:
        if not Path(name).is_dir():
            conditions = re.split(r",(?=\s*[\w./]+=)", name)
            matches |= {
                i
                for i, row in enumerate(table.rows)
                if all(_matches(table, row, condition.strip()) for condition in conditions)
            } or set(_rows_of_run(table, name))
    if not matches:
        values = {format_value(value) for row in table.rows for value in row.keys.values()}
        remedy = nearest(names[0], values | {table.label(row) for row in table.rows}) if len(table.rows) <= 20 else ""
        raise UserError(
            "matches no row of this table", key="--baseline", value=names[0], remedy=remedy, code=Code.UNKNOWN_CHOICE
        )
    return matches


def _rows_of_run(table: Table, reference: str) -> list[int]:
    """Return the number of the row of the run that a name, an id or `last` stands for; an empty list without one.

    Raises:
        UserError: the reference is the beginning of several ids.
    """
    runs = [StoredRun(folder, record) for folder, record in table.records.items()]
    runs.sort(key=lambda run: run.record["created"] or "")
    if not match_runs(reference, runs):
        return []
    folder = choose_run(reference, runs, "--baseline").folder
    return [i for i, row in enumerate(table.rows) if folder in row.folders]


def _is_below(folder: Path, parents: set[Path]) -> bool:
    """Return whether a folder is one of some resolved folders or lies below one."""
    folder = folder.resolve()
    return not parents.isdisjoint((folder, *folder.parents))


def _matches(table: Table, row: Row, condition: str) -> bool:
    """Return whether a row has `key=value` among its choices and key columns, or a value alone."""
    key, _, expected = condition.rpartition("=")
    key_texts = {name: format_value(value) for name, value in row.keys.items()}
    values = {name: str(choice) for name, choice in _first_record(table, row)["choices"].items()} | key_texts
    return values.get(key.strip()) == expected.strip() if key else expected in values.values()


def _candidates(table: Table, row_numbers: Sequence[int], named_rows: set[int] | None) -> tuple[list[int], str]:
    """Return the rows of one data set that its baseline is chosen from, and the reason for the notes.

    Of named rows, the candidates are those whose setting stands for its method (`Row.chosen`). If none does, they are
    all of them with at least half as many seeds as another one. They may have learned nothing.

    Without named rows, the candidates are chosen rows that learned something: those of full fine-tuning; if there are
    none, those of plain LoRA; if there are none, the single row that is best on the selection split. If that row has no
    score of that split, the first row is the candidate.

    Args:
        table: rows of all data sets.
        row_numbers: the rows of this one.
        named_rows: the rows that `--baseline` matches, on any data; None: it is not given.

    Returns:
        (row numbers, reason); no rows if the data set has no candidate.
    """
    if named_rows is not None:
        named = [i for i in row_numbers if i in named_rows]
        with_seeds = list(compress(named, have_enough_seeds([table.rows[i].n for i in named])))
        return [i for i in named if table.rows[i].chosen] or with_seeds, "named by --baseline"
    chosen = [i for i in row_numbers if table.rows[i].chosen and table.rows[i].learned]
    for adapter, reason in (("full", "full fine-tuning"), ("lora", "plain LoRA")):
        matches = [i for i in chosen if _first_record(table, table.rows[i])["choices"].get("adapter") == adapter]
        if matches:
            return matches, reason
    if not chosen:
        return [], ""
    best = max(chosen, key=lambda i: _selection_score(table, table.rows[i]))
    if _selection_score(table, table.rows[best]) > -math.inf:
        return [best], "the best on selection"
    return chosen[:1], "the best on the tested scores, so differences from it are too large"


def _first_record(table: Table, row: Row) -> dict[str, Any]:
    """Return the record of a row's first run."""
    return table.records[row.folders[0]]


# -- notes and the table of tests --


def _notes(subject: str, reason: str, tests: Sequence[Finding], margin: float) -> list[str]:
    """Return the notes about the tests of one data set: baseline, seeds, examples, and rows without a test."""
    subject_line = f"tests of {subject} ({reason})"
    decided = [test for test in tests if test.p_holm is not None]
    lines = []
    if decided:
        lines.append(
            f"{subject_line}: {seeds_range(decided)} paired seeds and {decided[0].examples:,} examples; "
            f"p adjusted by Holm over {len(decided)} rival{'s' * (len(decided) > 1)}; a difference "
            f"within {margin:g} is equivalent (--margin)"
        )
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


def seeds_range(tests: Sequence[Finding]) -> str:
    """Return the number of paired seeds of some tests as text: `3`, or `2 to 5`."""
    seeds = sorted({test.paired_seeds for test in tests if test.paired_seeds})
    return f"{seeds[0]}" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]}"


_KEEP_BY_COLUMN = {
    "difference": 5,
    "95 % interval": 4,
    "p (Holm)": 3,
    "effect size": 0,
    "detects": 1,
    "seeds": 2,
    "verdict": 6,
}
"""Columns of the table of tests, with their `Column.keep`."""


def readable_tests(table: Table) -> Table | None:
    """Return the findings as a table of texts, a row for each tested row of `table`; None if no row was tested.

    The column of differences is named by the tested metric. If there are several, a column `metric` names them.
    """
    measures = list(dict.fromkeys(row.finding.measure for row in table.rows if row.finding))
    difference = f"{measures[0]} difference" if len(measures) == 1 else "difference"
    names = {("metric" if len(measures) > 1 else ""): 7, **_KEEP_BY_COLUMN}
    columns = [
        Column(difference if name == "difference" else name, "text", keep=keep) for name, keep in names.items() if name
    ]
    rows = [
        replace(row, keys=row.keys | _finding_texts(row.finding, difference), n=1) for row in table.rows if row.finding
    ]
    return Table([*table.keys, *columns], rows) if rows else None


def _finding_texts(finding: Finding, difference: str) -> dict[str, str]:
    """Return the cells of a finding by column; a value that is None has no cell.

    Args:
        finding: of a row.
        difference: the header of the column of differences.
    """
    texts = {"verdict": finding.verdict, "metric": finding.measure}
    if finding.difference is not None:
        texts[difference] = f"{finding.difference:+.4f}"
        if finding.difference_low is not None:
            texts["95 % interval"] = f"{finding.difference_low:+.4f} to {finding.difference_high:+.4f}"
        texts["seeds"] = str(finding.paired_seeds)
    if finding.p_holm is not None:
        texts["p (Holm)"] = "<0.001" if finding.p_holm < 0.001 else f"{finding.p_holm:.3f}"
    if finding.effect_size is not None:
        texts["effect size"] = f"{finding.effect_size:+.2f}"
    if finding.detectable is not None:
        texts["detects"] = f"{finding.detectable:.4f}"
    return texts
