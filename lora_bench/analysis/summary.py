"""From run folders to a table: a row per experiment, mean and spread over its seeds, verdicts and notes."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.baseline import add_verdicts
from lora_bench.analysis.columns import STRESS_COLUMNS, has_column
from lora_bench.analysis.experiments import (
    OUTSIDE_THE_EXPERIMENT,
    REQUEST_LIMITS,
    RecordedRun,
    all_keys,
    check_key,
    describe_run,
    differs,
    group_runs,
    is_implied,
    keep_newest_per_seed,
)
from lora_bench.analysis.formats import to_csv, to_markdown
from lora_bench.analysis.savings import add_costs
from lora_bench.analysis.significance import MARGIN
from lora_bench.analysis.table import Column, Missing, Row, Stat, Table
from lora_bench.config.metric_names import MAIN_METRICS
from lora_bench.errors import Code, UserError
from lora_bench.files.atomic_io import write
from lora_bench.records import metrics_log, sweep_folder
from lora_bench.records.backfill import align_configs
from lora_bench.records.evaluations import add_evaluations, unreadable_notes
from lora_bench.records.run_folder import METRICS_FILE, altered_notes, find_runs, is_killed, is_prompted
from lora_bench.records.task_folders import split_by_task

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

OTHER_METRICS = ("precision", "recall", "auroc", "nll", "ece", "brier")
"""Standard metrics without a column; they stay in run.json. Main metrics and configured ones have columns."""


COSTS = {
    "params.adapter": "count",
    "params.head": "count",
    "params.total": "count",
    "cost.train_seconds": "seconds",
    "cost.train_flops": "flops",
    "cost.peak_memory_bytes": "bytes",
}
"""Columns of costs, with their `Column.format`."""


KEEP = (
    "params.total",
    "cost.peak_memory_bytes",
    "cost.train_flops",
    "params.head",
    "cost.train_seconds",
    "params.adapter",
)
"""Columns in the order in which a narrow terminal drops them."""


def write_tables(folder: Path, baseline: str | None = None) -> None:
    """Write `table.md` and `table.csv` of a finished sweep into its folder; nothing if it has no runs."""
    if find_runs([folder])[0]:
        table = summarise([folder], baseline=baseline)
        write(folder, sweep_folder.TABLE_MARKDOWN, to_markdown(table).encode())
        write(folder, sweep_folder.TABLE_CSV, to_csv(table).encode())


def summarise(
    paths: Sequence[Path],
    by: str | None = None,
    baseline: str | None = None,
    margin: float = MARGIN,
    measure: str = "mcc",
    target: float | None = None,
) -> Table:
    """Return the runs at or below `paths` as a table with verdicts, savings and notes.

    Args:
        paths: run folders, sweeps, or folders above.
        by: a configuration key: a row per value of it instead of a row per experiment.
        baseline: the row that the others are tested against (`add_verdicts`).
        margin: the largest difference that counts as equivalent.
        measure: the metric to test.
        target: the selection MCC up to which costs are counted (`add_costs`).

    Raises:
        UserError: a path does not exist, there are no runs, or a key or baseline is unknown.
    """
    runs_found, skipped = find_runs(paths)
    runs_found, unread_tasks = split_by_task(runs_found)
    runs_found = [(folder, add_evaluations(folder, record)) for folder, record in align_configs(runs_found)]
    if not runs_found:
        skipped_note = f"; skipped {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        remedy = "Give the folder of a run or one above it; `lora-bench train` makes runs below outputs/."
        raise UserError(
            f"no runs here{skipped_note}", file=", ".join(map(str, paths)), remedy=remedy, code=Code.NOT_FOUND
        )
    splits = _reported_splits(record for _, record in runs_found if record["status"] == "done")
    all_runs = [describe_run(folder, record, splits) for folder, record in runs_found]
    finished = [run for run in all_runs if run.record["status"] == "done"]
    # A run that only chose a learning rate is no rival of runs that were trained with it.
    reporting = [run for run in finished if run.keys.get("data.report") is not False]
    n_hidden = len(finished) - len(reporting) if reporting else 0
    if n_hidden:
        hidden = {run.folder for run in finished} - {run.folder for run in reporting}
        all_runs, finished = [run for run in all_runs if run.folder not in hidden], reporting
    keys = [key for key in all_keys(all_runs) if key.split(".")[0] not in OUTSIDE_THE_EXPERIMENT]
    keys = [key for key in keys if key not in REQUEST_LIMITS]
    runs = keep_newest_per_seed(finished, keys)
    varying = [key for key in keys if differs(key, runs)]
    shown_keys = [key for key in varying if not is_implied(key, varying, runs)]
    if by is None:
        groups, shown_keys = (
            group_runs(runs, keys),
            shown_keys or [key for key in ("model", "adapter", "data") if key in keys],
        )
    else:
        check_key(by, all_keys(all_runs), shown_keys)
        # Runs on different data are different rows, whatever the key.
        shown_keys = [by, *(key for key in shown_keys if key != by and key.split(".")[0] == "data")]
        groups = group_runs(runs, shown_keys)
    metrics = _metric_columns(runs, splits)
    costs = {name: Column(name, unit, keep=KEEP.index(name)) for name, unit in COSTS.items()}
    rows = _ordered([_row(group, shown_keys, metrics | costs) for group in groups], [*metrics.values()])
    missing = [_unfinished(run) for run in all_runs if run.record["status"] != "done"]
    missing += [Missing("skipped", folder, reason) for folder, reason in [*skipped, *unread_tasks]]
    mcc = metrics[f"{splits[0]}/mcc"].name
    # A row of `--by` may have several experiments, so it has no interval over seeds.
    interval = [Column(f"{mcc} 95 %", "interval", of=mcc)] if by is None else []
    columns = [*(Column(key, "key") for key in shown_keys), *metrics.values(), *interval, *costs.values()]
    notes = _caveats(rows, runs, len(finished) - len(runs), splits) + unreadable_notes(run.record for run in runs)
    notes += altered_notes((run.folder, run.record) for run in all_runs)
    if n_hidden:
        notes.append(f"{n_hidden} runs that only chose a learning rate (data.report=false) are not shown")
    table = Table(columns, rows, notes, missing, {run.folder: run.record for run in all_runs})
    return add_costs(add_verdicts(table, splits[0], baseline, margin, measure), target)


def _reported_splits(records: Iterable[dict[str, Any]]) -> list[str]:
    """Return the splits that were scored once, at the end; selection only if no run has another one."""
    splits = {key.split("/")[0] for record in records for key in record["metrics"] if "/" in key}
    order = ("validation", "test", *sorted(splits))
    reported = [split for split in dict.fromkeys(order) if split in splits - {"train", "selection"}]
    return reported or [split for split in ("selection",) if split in splits] or ["validation"]


def _metric_columns(runs: Sequence[RecordedRun], splits: Sequence[str]) -> dict[str, Column]:
    """Return a column for each `split/metric` of run.json; its header names the split where it is not obvious."""
    columns = {}
    recorded = sorted({key for run in runs for key in run.record["metrics"]})
    own_splits = [split for split in splits if ":" not in split]  # the rest are later evaluations on other data
    for i, split in enumerate(splits):
        extra = [key.removeprefix(f"{split}/") for key in recorded if key.startswith(f"{split}/")]
        extra = [name for name in extra if name not in MAIN_METRICS + OTHER_METRICS and has_column(name)]
        main = [name for name in MAIN_METRICS if split in own_splits or f"{split}/{name}" in recorded]
        for name in [*main, *extra]:
            header = name if own_splits == [split] and split != "selection" else f"{split}/{name}"
            rank = MAIN_METRICS.index(name) if name in MAIN_METRICS else -1
            directions = {run.keys.get(f"metric.{name}.direction") for run in runs}
            arrow = (
                "↑"
                if rank >= 0 or "up" in directions
                else "↓"
                if "down" in directions
                else STRESS_COLUMNS.get(name, "")
            )
            columns[f"{split}/{name}"] = Column(header, "metric", arrow, keep=len(KEEP) + 9 * (len(splits) - i) + rank)
    return columns


def _row(group: Sequence[RecordedRun], shown_keys: Sequence[str], columns: dict[str, Column]) -> Row:
    """Return the row of a group of runs."""
    stats = {}
    for source, column in columns.items():
        section, _, name = source.partition(".")
        path = ("metrics", source) if column.format == "metric" else (section, name)
        stat = _stat([run.record[path[0]].get(path[1]) for run in group])
        if stat is not None:
            stats[column.name] = stat
    keys = {key: _short(group[0].keys[key]) for key in shown_keys if key in group[0].keys}
    return Row(keys, stats, len(group), [run.folder for run in group], data=group[0].data)


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


def _ordered(rows: Sequence[Row], metrics: Sequence[Column]) -> list[Row]:
    """Return the rows grouped by data, best MCC first, with the best value of each metric on the data marked."""

    def mcc(row: Row) -> float:
        return next(
            (row.stats[c.name].mean for c in metrics if c.name.endswith("mcc") and c.name in row.stats), -math.inf
        )

    blocks: dict[str | None, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -mcc(row)):
        blocks.setdefault(row.data, []).append(row)
    ordered = []
    for block in blocks.values():
        tops: dict[str, float] = {}
        for column in metrics:
            means = [row.stats[column.name].mean for row in block if column.name in row.stats]
            if len(means) > 1 and column.arrow:
                tops[column.name] = max(means) if column.arrow == "↑" else min(means)
        for row in block:
            best = {name for name, top in tops.items() if name in row.stats and row.stats[name].mean == top}
            ordered.append(replace(row, best=frozenset(best)))
    return ordered


def _caveats(rows: Sequence[Row], runs: Sequence[RecordedRun], repeated: int, splits: Sequence[str]) -> list[str]:
    """Return the notes about runs that limit what the table shows."""
    lines = []
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
    if repeated:
        lines.append(f"{repeated} finished run(s) repeat an experiment and its seed; the newest counts")
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


def _unfinished(run: RecordedRun) -> Missing:
    """Return the entry of a run that is not done, with its error or its last evaluation."""
    record = run.record
    killed = is_killed(run.folder, record)
    status, overrides = "killed" if killed else record["status"], " ".join(map(str, record["overrides"]))
    if record["status"] != "running":
        reason = record["error"] or "no reason recorded"
        return Missing(status, run.folder, reason if len(reason) <= 300 else reason[:299] + "…", overrides)
    reason = f"since {(record['created'] or '?')[:16].replace('T', ' ')} UTC"
    logged = metrics_log.last_line(run.folder / METRICS_FILE) or {}
    metrics = logged.get("metrics")
    mcc = metrics.get("mcc") if isinstance(metrics, dict) else None
    if isinstance(mcc, float):
        reason += f", step {logged.get('step')}, {logged.get('split')} mcc {mcc:.4f}"
    remedy = "run the same command again" if is_prompted(record) else f"resume it with resume={run.folder}"
    return Missing(status, run.folder, f"{reason}; its process has ended: {remedy}" if killed else reason, overrides)
