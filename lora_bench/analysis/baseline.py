"""Which row of a table the others are tested against, and what is said of the tests.

`judged` is what `lora-bench compare` calls; the tests themselves are in `comparison.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.columns import NAMES
from lora_bench.analysis.significance import (
    BASELINE,
    MARGIN,
    NOT_TESTED,
    Finding,
    against,
    best_experiment,
    label,
    selection_mcc,
)
from lora_bench.analysis.table import Column, Row, Table, value_text
from lora_bench.config.keys import key_of
from lora_bench.errors import Code, UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

FEW_RUNS = 200
"""A table of more finished runs is tested only when a baseline is named: their predictions take a while to read."""


def judged(
    table: Table,
    split: str,
    baseline: str | None = None,
    margin: float = MARGIN,
    measure: str = "mcc",
    *,
    always: bool = False,
) -> Table:
    """The table with a `Finding` in its rows and the notes that belong to them.

    Args:
        table: rows, and the records of their runs.
        split: whose predictions are compared.
        baseline: what to compare with (`find_row`); None takes full fine-tuning, else plain LoRA, else the best row.
        margin: a difference up to this is of no account.
        measure: what differs, of `stats.MEASURES`.
        always: also where a baseline was not asked for and there are many runs.

    Raises:
        UserError: no row is meant by `baseline`.
    """
    blocks: dict[str | None, list[int]] = {}
    for i, row in enumerate(table.rows):
        blocks.setdefault(row.data, []).append(i)
    runs = sum(row.n for row in table.rows)
    if baseline is None and (max(map(len, blocks.values()), default=0) < 2 or (runs > FEW_RUNS and not always)):
        many = [f"no tests of {runs:,} runs unless a row to compare with is named: --baseline NAME"]
        return replace(table, notes=table.notes + many) if runs > FEW_RUNS else table
    meant = None if baseline is None else _rows_meant(table, baseline)
    rows, notes = list(table.rows), []
    for block in blocks.values():
        candidates, why = _candidates(table, block, meant)
        if len(block) < 2 or not candidates:
            continue
        chosen = max(candidates, key=lambda i: selection_mcc(table, table.rows[i].folders))
        rivals = [i for i in block if i != chosen]
        name = label(table, table.rows[chosen])
        tests = against(table, table.rows[chosen], [table.rows[i] for i in rivals], split, margin, measure)
        rows[chosen] = replace(rows[chosen], finding=Finding(name, BASELINE, measure))
        for i, finding in zip(rivals, tests, strict=True):
            rows[i] = replace(rows[i], finding=finding)
        about = f"{split} {NAMES.get(measure, measure)} against {name}"
        notes += _notes(about, why if len(candidates) == 1 else f"{why}, the best on selection", tests, margin)
        notes += _choices_within(table, [table.rows[i] for i in block])
    for i, row in enumerate(rows):
        if row.finding is None and notes:
            rows[i] = replace(row, finding=Finding("", NOT_TESTED, measure, "on other data than any baseline"))
    found = replace(table, rows=rows, notes=[*notes, *table.notes])
    return replace(found, tests=_for_people(found, measure)) if notes else table


# -- which row is meant --


def _rows_meant(table: Table, name: str) -> set[int]:
    """The rows that `name` fits: a run's folder or one above, `key=value,key=value`, or a value alone (`full`)."""
    place = Path(name)
    if place.is_dir():
        inside = [i for i, row in enumerate(table.rows) if any(_is_below(folder, place) for folder in row.folders)]
    else:
        parts = re.split(r",(?=\s*[\w./]+=)", name)
        inside = [i for i, row in enumerate(table.rows) if all(_fits(table, row, part.strip()) for part in parts)]
    if not inside:
        words = {value_text(value) for row in table.rows for value in row.keys.values()}
        remedy = nearest(name, words | {label(table, row) for row in table.rows}) if len(table.rows) <= 20 else ""
        raise UserError(
            "is no row of this table", key="--baseline", value=name, remedy=remedy, code=Code.UNKNOWN_CHOICE
        )
    return set(inside)


def _is_below(folder: Path, place: Path) -> bool:
    place = place.resolve()
    return place in (folder.resolve(), *folder.resolve().parents)


def _fits(table: Table, row: Row, part: str) -> bool:
    key, _, wanted = part.rpartition("=")
    shown = {name: value_text(value) for name, value in row.keys.items()}
    values = {name: str(choice) for name, choice in _record(table, row)["choices"].items()} | shown
    return values.get(key.strip()) == wanted.strip() if key else wanted in values.values()


def _candidates(table: Table, block: Sequence[int], meant: set[int] | None) -> tuple[list[int], str]:
    """The rows of a block that may be its baseline, and why."""
    if meant is not None:
        return [i for i in block if i in meant], "as asked"
    for adapter, why in (("full", "full fine-tuning"), ("lora", "plain LoRA")):
        found = [i for i in block if _record(table, table.rows[i])["choices"].get("adapter") == adapter]
        if found:
            return found, f"{why}, unless --baseline names another"
    best = max(block, key=lambda i: selection_mcc(table, table.rows[i].folders))
    if selection_mcc(table, table.rows[best].folders) > -math.inf:
        return [best], "best on selection, unless --baseline names another"
    return [block[0]], "best on these same scores, which flatters it, unless --baseline names another"


def _record(table: Table, row: Row) -> dict[str, Any]:
    return table.records[row.folders[0]]


# -- what is said --


def _notes(about: str, why: str, tests: Sequence[Finding], margin: float) -> list[str]:
    told = f"verdicts are about {about} ({why})"
    judged = [test for test in tests if test.p_holm is not None]
    lines = []
    if judged:
        seeds = sorted({test.paired_seeds for test in judged if test.paired_seeds})
        span = f"{seeds[0]}" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]}"
        weakest = min(test.power for test in judged if test.power is not None)
        lines.append(
            f"{told}: {span} paired seeds and {judged[0].examples:,} examples, both counted as chance; p by Holm over "
            f"{len(judged)} rival{'s' * (len(judged) > 1)}; within {margin:g} is indistinguishable (--margin)"
        )
        lines.append(f"a true difference of {margin:g} would be found with a chance of {weakest:.0%} or more")
    else:
        lines.append(f"{told}: none could be given")
    reasons: dict[str, list[str]] = {}
    for test in tests:
        if test.why:
            reason, _, where = test.why.partition(": ")
            reasons.setdefault(reason, []).append(where)
    for reason, places in reasons.items():
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        where = f": {places[0]}{more}" if places[0] else ""
        lines.append(f"{len(places)} of {len(tests)} rows: {reason}{where}")
    return lines


def _choices_within(table: Table, rows: Sequence[Row]) -> list[str]:
    """Which of a row's experiments was tested, where it has several."""
    lines = []
    for row in rows:
        best = best_experiment(table, row)
        if len(best) < row.n:
            overrides = " ".join(str(x) for x in table.records[best[0]]["overrides"] if key_of(str(x)) != "seed")
            lines.append(f"{label(table, row)}: tested is what is best on selection of its experiments: {overrides}")
    return lines


_COLUMNS = {
    "difference": 5,
    "95 % interval": 4,
    "p (Holm)": 3,
    "effect size": 0,
    "power": 1,
    "seeds": 2,
    "verdict": 6,
}


def _for_people(table: Table, measure: str) -> Table:
    columns = [*table.keys, *(Column(_header(name, measure), "text", keep=keep) for name, keep in _COLUMNS.items())]
    rows = [replace(row, keys=row.keys | _texts(row.finding), n=1) for row in table.rows if row.finding]
    return Table(columns, rows)


def _header(name: str, measure: str) -> str:
    return f"{measure} difference" if name == "difference" else name


def _texts(finding: Finding) -> dict[str, str]:
    found = {"verdict": finding.verdict}
    if finding.difference is not None:
        found[_header("difference", finding.measure)] = f"{finding.difference:+.4f}"
        found["95 % interval"] = f"{finding.difference_low:+.4f} to {finding.difference_high:+.4f}"
        found["seeds"] = str(finding.paired_seeds)
    if finding.p_holm is not None:
        found["p (Holm)"] = "<0.001" if finding.p_holm < 0.001 else f"{finding.p_holm:.3f}"
    if finding.effect_size is not None:
        found["effect size"] = f"{finding.effect_size:+.2f}"
    if finding.power is not None:
        found["power"] = f"{finding.power:.0%}"
    return found
