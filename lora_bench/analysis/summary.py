"""From run folders to a table with a decision: a row per method, with its setting that is best on selection."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.baseline import add_verdicts, readable_tests
from lora_bench.analysis.columns import cost_columns, metric_columns
from lora_bench.analysis.decision import add_decisions
from lora_bench.analysis.formats import to_csv, to_markdown
from lora_bench.analysis.loading import LoadedRuns, load_runs
from lora_bench.analysis.ordering import limit, mark_best, sort_rows
from lora_bench.analysis.savings import add_costs, readable_savings
from lora_bench.analysis.settings import (
    COMPUTATION_KEYS,
    TUNED_KEYS,
    RecordedRun,
    all_keys,
    check_key,
    choose_setting,
    differs,
    group_runs,
    is_implied,
)
from lora_bench.analysis.significance import MARGIN
from lora_bench.analysis.table import Column, Row, Stat, Table
from lora_bench.config.metric_names import ALL_MAIN_METRICS, MAIN_METRIC_CHOICES, display_name
from lora_bench.config.recorded_task import main_metric
from lora_bench.errors import Code, UserError
from lora_bench.evaluation.chance import describe_failure
from lora_bench.files.atomic_io import write
from lora_bench.records import sweep_folder
from lora_bench.records.evaluations import unreadable_notes
from lora_bench.records.run_folder import altered_notes, find_runs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


NAME = "name"
"""The column of the name that the runs of a row share; there is none if no row has one."""


@dataclass(frozen=True)
class View:
    """The rows of a comparison to show, and their order. Decisions do not depend on it."""

    all_settings: bool = False
    """Also show the settings that do not stand for their method."""
    sort: str | None = None
    """Column to sort by in place of the order by data, recommendation and main metric."""
    top: int | None = None
    """Number of rows to show; None: all."""


def write_tables(folder: Path, baseline: str | list[str] | None = None) -> Table | None:
    """Write `table.md` and `table.csv` of a sweep into its folder, and return the table; None if it has no runs."""
    if not find_runs([folder])[0]:
        return None
    table = summarise([folder], baseline=baseline)
    write(folder, sweep_folder.TABLE_MARKDOWN, to_markdown(table).encode())
    write(folder, sweep_folder.TABLE_CSV, to_csv(table).encode())
    return table


def summarise(
    paths: Sequence[Path],
    by: str | None = None,
    baseline: str | list[str] | None = None,
    margin: float = MARGIN,
    measure: str | None = None,
    target: float | None = None,
    where: str | None = None,
    view: View | None = None,
) -> Table:
    """Return the runs at or below `paths` as a table with verdicts, savings, notes and advice.

    Args:
        paths: run folders, sweeps, or folders above.
        by: configuration keys, separated by commas: a row per combination of their values instead of a row per method.
        baseline: the row that the others are tested against, or several to choose from (`add_verdicts`).
        margin: the largest difference that counts as equivalent.
        measure: the metric to test; None: the main metric of the runs.
        target: the main metric on the selection split up to which costs are counted (`add_costs`).
        where: conditions on configuration keys that runs have to meet (`where.parse`).
        view: rows to show and their order.

    Raises:
        UserError: a path does not exist, there are no runs, or a key, condition, baseline or measure is wrong.
    """
    loaded = load_runs(paths)
    if where is not None:
        loaded = loaded.filtered(where)
    view = view or View()
    if measure is not None:
        _check_measure(measure, loaded.finished)
    by_keys = None if by is None else [key.strip() for key in by.split(",")]
    runs = loaded.newest(by_keys or ())
    table = _settings_table(loaded, runs, by_keys, measure)
    table = add_verdicts(table, baseline, margin)
    table = add_costs(table, target)
    table = add_decisions(table, margin)
    table = replace(table, settings=table.rows, rows=_visible(table.rows, view), notes=_notes(table, loaded, runs))
    table = replace(table, rows=mark_best(table))
    table = limit(sort_rows(table, view.sort), view.top)
    return replace(table, tests=readable_tests(table), savings=readable_savings(table))


def _check_measure(measure: str, runs: Sequence[RecordedRun]) -> None:
    """Refuse a metric that the predictions of some of the runs do not give.

    Raises:
        UserError: naming the choices.
    """
    forms = list(dict.fromkeys(run.form for run in runs))
    choices = [name for name in ALL_MAIN_METRICS if all(name in MAIN_METRIC_CHOICES[form] for form in forms)]
    if measure in choices:
        return
    remedy = f"Give one of {', '.join(choices)}."
    if not choices:
        remedy = "These tasks share no metric. Leave the option out, or choose one task with --where."
    elif len(forms) > 1:
        remedy += " Tasks of different forms are compared; choose one with --where for its other metrics."
    reason = "cannot be computed from the predictions of these runs"
    raise UserError(reason, key="--measure", value=measure, remedy=remedy, code=Code.UNKNOWN_CHOICE)


# -- rows --


def _settings_table(
    loaded: LoadedRuns, runs: Sequence[RecordedRun], by_keys: Sequence[str] | None, measure: str | None
) -> Table:
    """Return the table of all settings, best first, with the chosen setting of each method marked.

    Args:
        loaded: all runs.
        runs: the finished ones to show.
        by_keys: the keys of the option `--by`; None: it is not given.
        measure: the metric to test; None: the main metric of the runs.
    """
    keys = loaded.keys
    varying = [key for key in keys if differs(key, runs)]
    shown_keys = [key for key in varying if not is_implied(key, varying, runs)]
    if by_keys is None:
        method_keys = [key for key in shown_keys if key not in TUNED_KEYS]
    else:
        for key in by_keys:
            check_key("--by", key, all_keys(loaded.all), shown_keys)
        data_keys = [key for key in shown_keys if key.split(".")[0] == "data" and key not in by_keys]
        method_keys = [*by_keys, *data_keys]
        keys = [*keys, *(key for key in by_keys if key not in keys)]
        shown_keys = [*method_keys, *(key for key in shown_keys if key not in method_keys)]
    shown_keys = shown_keys or [key for key in ("model", "adapter", "data") if key in keys]
    metrics, costs = metric_columns(runs, loaded.splits, measure), cost_columns()
    rows: list[Row] = []
    # Runs with other data or another main metric are different rows, whatever the key.
    for number, method in enumerate(group_runs(runs, method_keys, comparable=True)):
        settings = group_runs(method, keys)
        chosen = choose_setting(settings)
        for i, setting in enumerate(settings):
            row = _row(setting, shown_keys, metrics | costs)
            row = replace(row, method=number, chosen=i == chosen, measure=measure or setting[0].main_metric)
            rows.append(row)
    records = {run.folder: run.record for run in loaded.all}
    main = {f"{run.split}/{run.main_metric}" for run in runs} or {f"{loaded.splits[0]}/mcc"}
    in_order = [column.name for source, column in metrics.items() if source in main]
    intervals = [Column(f"{name} 95 %", "interval", of=name) for name in in_order]
    names = [Column(NAME, "text")] if NAME not in shown_keys and any(NAME in row.keys for row in rows) else []
    columns = [*(Column(key, "key") for key in shown_keys), *names, *metrics.values(), *intervals, *costs.values()]
    return Table(columns, _best_first(rows, metrics, records), [], loaded.missing, records)


def _row(runs: Sequence[RecordedRun], shown_keys: Sequence[str], columns: dict[str, Column]) -> Row:
    """Return the row of a setting.

    Args:
        runs: of the setting.
        shown_keys: its key columns.
        columns: metrics and costs, by key in run.json.
    """
    stats, split = {}, runs[0].split
    for source, column in columns.items():
        section, _, name = source.partition(".")
        path = ("metrics", source) if column.format == "metric" else (section, name)
        stat = _stat([run.record[path[0]].get(path[1]) for run in runs])
        if stat is not None:
            stats[column.name] = stat
    keys = {key: _short(runs[0].keys[key]) for key in shown_keys if key in runs[0].keys}
    names = {run.keys.get(NAME) for run in runs} - {None}
    keys |= {NAME: names.pop()} if len(names) == 1 and NAME not in keys else {}
    unlearned = sum(_failure(run.record, split) is not None for run in runs)
    folders = [run.folder for run in runs]
    return Row(keys, stats, len(runs), folders, data=runs[0].block, split=split, unlearned=unlearned)


def _failure(record: dict[str, Any], split: str) -> str | None:
    """Return the reason that a run counts as one that learned nothing, or None."""
    rows = record["data"].get("rows")
    examples = rows.get(split) if isinstance(rows, dict) else None
    return describe_failure(record, split, examples if isinstance(examples, int) else None)


def _short(value: Any) -> Any:
    """Return a value for a key column: a hash is cut to 12 characters."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value) else value


def _stat(values: Sequence[Any]) -> Stat | None:
    """Return the mean and spread of the values that are not None; None if there are none."""
    try:
        numbers = [float(value) for value in values if value is not None]
        mean = statistics.fmean(numbers)
    except statistics.StatisticsError:  # none
        return None
    n = len(numbers)
    std = math.hypot(*(number - mean for number in numbers)) / math.sqrt(n - 1) if n > 1 else None
    return Stat(mean, std, n) if std is None or math.isfinite(std) else None


def _best_first(rows: Sequence[Row], columns: dict[str, Column], records: dict[Path, dict[str, Any]]) -> list[Row]:
    """Return the rows grouped by data, the block with the best value first, and best first within a block.

    Args:
        rows: of all data sets.
        columns: of the metrics, by key in run.json.
        records: `run.json` by folder.
    """

    def position(row: Row) -> float:
        column = columns.get(f"{row.split}/{main_metric(records[row.folders[0]])}")
        stat = None if column is None else row.stats.get(column.name)
        return math.inf if stat is None else -stat.mean

    blocks: dict[str | None, list[Row]] = {}
    for row in sorted(rows, key=position):
        blocks.setdefault(row.data, []).append(row)
    return [row for block in blocks.values() for row in block]


def _visible(rows: Sequence[Row], view: View) -> list[Row]:
    """Return the rows to show: one per method and the baseline; all of a data set if it has only one method."""
    methods: dict[str | None, set[int]] = {}
    chosen_methods = {row.method for row in rows if row.chosen}
    for row in rows:
        methods.setdefault(row.data, set()).add(row.method)
    return [
        row
        for row in rows
        if row.chosen
        or view.all_settings
        or len(methods[row.data]) == 1
        or row.method not in chosen_methods
        or row.is_baseline
    ]


# -- notes --


def _notes(table: Table, loaded: LoadedRuns, runs: Sequence[RecordedRun]) -> list[str]:
    """Return the table's notes, with those about the runs of the table that limit what it shows."""
    notes = [*_choice_notes(table), *table.notes, *_unlearned_notes(table)]
    notes += _caveats(table.rows, runs, loaded)
    notes += unreadable_notes(run.record for run in runs)
    notes += altered_notes((run.folder, run.record) for run in loaded.all)
    if loaded.hidden:
        notes.append(f"{loaded.hidden} runs that only chose a setting (data.report=false) are not shown")
    return notes


def _choice_notes(table: Table) -> list[str]:
    """Return the notes about the settings that stand for their methods."""
    by_method: dict[int, list[Row]] = {}
    for row in table.rows:
        by_method.setdefault(row.method, []).append(row)
    tuned = [rows for rows in by_method.values() if len(rows) > 1]
    if not tuned:
        return []
    notes = []
    n_settings = sum(map(len, tuned))
    if any(row.chosen for rows in tuned for row in rows):
        if len(by_method) == 1:
            keys = [key.name for key in table.keys if key.name in TUNED_KEYS]
            remedy = f"; --by {keys[0]} tests its values against each other" if keys else ""
            notes.append(f"one method with {n_settings} settings, of which the best on selection is chosen{remedy}")
        else:
            notes.append(
                f"a row is the setting of its method that is best on selection, of {n_settings} settings of "
                f"{len(tuned)} methods; --all shows all"
            )
    unchosen = [rows for rows in tuned if not any(row.chosen for row in rows)]
    if unchosen:
        example = table.label(unchosen[0][0])
        notes.append(
            f"{len(unchosen)} methods have several settings and no selection scores, so none of them is chosen or "
            f"tested: {example}"
        )
    return notes + _edge_notes(table, tuned)


def _edge_notes(table: Table, methods: Sequence[Sequence[Row]]) -> list[str]:
    """Return a note about the tuned keys whose chosen value is the smallest or largest that was tried.

    Args:
        table: gives the keys.
        methods: the rows of each method that has several.
    """
    methods_by_edge: dict[str, list[str]] = {}
    keys = [key.name for key in table.keys if key.name in ("adapter.rank", "optimizer.lr")]
    for rows in methods:
        chosen = next((row for row in rows if row.chosen), None)
        for key in keys:
            values = sorted({row.keys[key] for row in rows if isinstance(row.keys.get(key), int | float)})
            if chosen is None or len(values) < 3 or chosen.keys.get(key) not in (values[0], values[-1]):
                continue
            end = "smallest" if chosen.keys[key] == values[0] else "largest"
            if key == "adapter.rank" and values[0] == 1 and end == "smallest":
                continue
            method = " ".join(str(value) for name, value in chosen.keys.items() if name not in TUNED_KEYS)
            methods_by_edge.setdefault(f"{end} {key}", []).append(method)
    if not methods_by_edge:
        return []
    edges = [f"{edge} ({', '.join(of_edge)})" if any(of_edge) else edge for edge, of_edge in methods_by_edge.items()]
    return [f"at the edge of the values tried, so that one beyond it may be better: {'; '.join(edges)}"]


def _unlearned_notes(table: Table) -> list[str]:
    """Return the note about the runs that learned nothing."""
    reasons = [
        (row, reason)
        for row in table.rows
        for folder in row.folders
        if (reason := _failure(table.records[folder], row.split)) is not None
    ]
    if not reasons:
        return []
    labels = list(dict.fromkeys(table.label(row) for row, _ in reasons))
    rest = f" and {len(labels) - 3} more settings" if len(labels) > 3 else ""
    runs, them = ("1 run", "it") if len(reasons) == 1 else (f"{len(reasons)} runs", "them")
    return [
        f"{runs} learned nothing ({reasons[0][1]}): {'; '.join(labels[:3])}{rest}; no target or savings "
        f"are computed from {them}"
    ]


def _caveats(rows: Sequence[Row], runs: Sequence[RecordedRun], loaded: LoadedRuns) -> list[str]:
    """Return the notes about the runs of the table that limit what it shows."""
    lines, splits, repeated = [], loaded.splits, len(loaded.finished) - len(runs)
    if not rows:
        lines.append("no finished run yet")
    if rows and all(row.n == 1 for row in rows):
        lines.append("one seed only: no spread")
    if rows and splits not in (["validation"], ["selection"]) and len(splits) == 1:
        lines.append(f"metrics of the {splits[0]} split")
    if any(run.keys.get("data.tasks") for run in runs):
        lines.append("a run of several tasks has a row for each; what they share (adapter, time, FLOPs) counts in all")
    if len({run.data for run in runs}) > 1:
        lines.append("runs on different data are not comparable: the best values are marked for each data set")
    if len(metrics := dict.fromkeys(run.main_metric for run in runs)) > 1:
        names = ", ".join(map(display_name, metrics))
        lines.append(
            f"the main metrics differ ({names}): runs are compared with those of the same task and main metric only"
        )
    if repeated:
        lines.append(f"{repeated} finished run(s) repeat a setting and its seed; the newest counts")
    by_folder = {run.folder: run for run in loaded.finished}  # with all keys
    if computed := _computed_differently([[by_folder[folder] for folder in row.folders] for row in rows]):
        lines.append(f"seeds of one row differ in {', '.join(computed)}: their seconds and memory cannot be compared")
    mixed = [str(run.folder) for run in runs if run.record["environment"].get("history")]
    if mixed:
        rest = f" and {len(mixed) - 3} more" if len(mixed) > 3 else ""
        lines.append(f"resumed in another environment (environment.history): {', '.join(mixed[:3])}{rest}")
    dirty = [str(run.folder) for run in runs if run.record["environment"].get("dirty") is True]
    if dirty:
        rest = f" and {len(dirty) - 3} more" if len(dirty) > 3 else ""
        lines.append(
            f"uncommitted changes in the code of {len(dirty)} of {len(runs)} runs: {', '.join(dirty[:3])}{rest}"
        )
    return lines


def _computed_differently(settings: Sequence[Sequence[RecordedRun]]) -> list[str]:
    """Return what differs in how the runs of one setting were computed: configuration keys, and keys of run.json."""
    keys = [key for key in sorted(COMPUTATION_KEYS) if any(len(group_runs(runs, [key])) > 1 for runs in settings)]
    for name in ("cpu", "device", "precision"):
        recorded = [{str(run.record["environment"].get(name)) for run in runs} - {"None"} for runs in settings]
        keys += [f"environment.{name}"] * any(len(values) > 1 for values in recorded)
    return keys
