"""Savings: bytes on disk, the cost of reaching the score of full fine-tuning, and the causes of what was saved.

The target is the main metric on the selection split that full fine-tuning of the same model on the same data ends with
in its worst seed, or a given one. It is reached at the first evaluation from which three in a row reach it, where
`trainer.stop_at` ends a run. FLOPs and seconds to target are those of the steps up to that first evaluation, and all
that came before the first step.

A step of full fine-tuning is one third forward pass, one third gradients of inputs, one third gradients of weights. An
adapter saves the last third. If it leaves the lowest m of L layers unadapted, it saves m / L of the second third, and
with a cached prefix m / L of the first, less the cost of filling the cache. Less padding saves by the share of tokens
that are no padding. An objective that passes each pair through the model twice has twice as many pairs per step. The
remainder is the computation of the adapter itself, its initialisation included.

Seconds are FLOPs divided by a rate. Time saved beyond the FLOPs is attributed to the precision where it differs, else
to the rate, which depends on the machine and on the size of its products.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.table import Column, Stat, Table
from lora_bench.config.groups import model_name
from lora_bench.config.metric_names import EVALUATIONS_AT_TARGET, display_name
from lora_bench.config.recorded_task import main_metric
from lora_bench.files.untrusted import as_number
from lora_bench.records.metrics_log import selection_curve
from lora_bench.records.run_folder import ADAPTER, METRICS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.analysis.table import Row

STEPS, FLOPS, SECONDS = "steps_to_target", "flops_to_target", "seconds_to_target"
"""Names of the columns of costs up to the target."""
BYTES = "adapter_bytes"
COLUMNS = (Column(BYTES, "bytes"), Column(STEPS, "count"), Column(FLOPS, "flops"), Column(SECONDS, "seconds"))
SAVED = "FLOPs saved"
CAUSES = (
    *("fewer steps", "pairs a step", "no weight gradients", "fewer layers", "cached prefix", "less padding"),
    "the adapter itself",
)
TIME_SAVED = "time saved"
TIME_CAUSES = ("precision", "rate")


def add_costs(table: Table, target: float | None = None) -> Table:
    """Return the table with bytes on disk, costs to target, and savings against full fine-tuning.

    If several rows are full fine-tuning, savings are against the baseline of the verdicts, else against the best
    setting that stands for its method. A row with a run that learned nothing has no savings, and sets no target.

    Args:
        table: rows with their findings, and the records of their runs.
        target: a main metric on the selection split; None takes the final one of full fine-tuning, where the table has
            such a row.
    """
    rows = [_add_bytes(row) for row in table.rows]
    full: dict[Any, int] = {}
    for i, row in enumerate(rows):
        if _choice(table, row, "adapter") == "full" and not row.unlearned:
            group = _comparable_group(table, row)
            kept = rows[full[group]] if group in full else None
            if kept is None or row.is_baseline or (row.chosen and not kept.chosen and not kept.is_baseline):
                full[group] = i  # the best comes first
    targets = {group: target or _final_score(table, rows[i]) for group, i in full.items()}
    for i, row in enumerate(rows):
        row_target = target or targets.get(_comparable_group(table, row))
        if row_target is not None and not row.unlearned:
            rows[i] = _add_costs_to_target(table, row, row_target)
    for i, row in enumerate(rows):
        baseline = full.get(_comparable_group(table, row), i)
        if baseline != i and _choice(table, row, "adapter") != "full" and not row.unlearned:
            rows[i] = replace(row, saved=savings(table, row, rows[baseline]))
    costed = replace(table, rows=rows, columns=[*table.columns, *COLUMNS])
    ends = sorted({end for end in targets.values() if end is not None}) if target is None else [target]
    notes = [_note(table, rows, ends, target)] if ends else []
    return replace(costed, notes=table.notes + notes)


def _add_bytes(row: Row) -> Row:
    """Return the row with the mean size of the folders that its runs would be loaded from."""
    sizes = []
    for folder in row.folders:
        try:
            sizes.append(_bytes(folder / ADAPTER))
        except OSError:
            return row
    return replace(row, stats=row.stats | {BYTES: Stat(fmean(sizes), None, row.n)})


def _bytes(folder: Path | os.DirEntry[str]) -> float:
    """Return the size of all files in a folder; an ensemble has a folder for each member."""
    with os.scandir(folder) as entries:
        return float(sum(_bytes(entry) if entry.is_dir() else entry.stat().st_size for entry in entries))


def _final_score(table: Table, row: Row) -> float | None:
    """Return the main metric on selection that the row's worst seed ends with; None if a run has no evaluations."""
    evaluations = [_selection_curve(table, folder) for folder in row.folders]
    return min(evaluation[-1][1] for evaluation in evaluations) if all(evaluations) else None


def _choice(table: Table, row: Row, group: str) -> Any:
    """Return the choice of a configuration group that a row was made with."""
    return table.records[row.folders[0]]["choices"].get(group)


def _comparable_group(table: Table, row: Row) -> tuple[Any, ...]:
    """Return a key that is equal for two rows whose costs can be compared: model, and data of the splits in use."""
    record = table.records[row.folders[0]]
    fingerprint = record["data"].get("fingerprint")
    splits = fingerprint if isinstance(fingerprint, dict) else {}
    return row.data, model_name(record), str(splits.get("train")), str(splits.get("selection"))


def _selection_curve(table: Table, folder: Path) -> list[tuple[float, float]]:
    """Return step and main metric of each evaluation of the selection split whose state the run may keep."""
    return selection_curve(folder / METRICS_FILE, main_metric(table.records[folder]), may_choose=True)


def _add_costs_to_target(table: Table, row: Row, target: float) -> Row:
    """Return the row with steps, FLOPs and seconds to target; unchanged if a seed did not reach it or has no costs."""
    values_by_column: dict[str, list[float]] = {STEPS: [], FLOPS: [], SECONDS: []}
    for folder in row.folders:
        reached = step_to_target(_selection_curve(table, folder), target)
        cost = table.records[folder]["cost"]
        if reached is None or not _positive(cost.get("steps")) or not _positive(cost.get("train_flops")):
            return row
        values_by_column[STEPS].append(reached)
        for name, unit in ((FLOPS, "flops"), (SECONDS, "seconds")):
            if _positive(cost.get(f"train_{unit}")):
                values_by_column[name].append(cost_up_to(cost, unit, reached))
    stats = {
        name: Stat(fmean(values), None, row.n)
        for name, values in values_by_column.items()
        if len(values) == len(row.folders)
    }
    return replace(row, stats=row.stats | stats)


def step_to_target(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return the step of the first evaluation that reaches the target to stay there; None if there is none.

    The next two evaluations must reach it too, as far as the run has them, so that a lucky one does not count.

    Args:
        curve: step and main metric of each evaluation.
        target: a main metric.
    """
    for i, (step, _) in enumerate(curve):
        if all(score >= target for _, score in curve[i : i + EVALUATIONS_AT_TARGET]):
            return step
    return None


def cost_up_to(cost: dict[str, Any], unit: str, step: float) -> float:
    """Return the FLOPs or seconds up to a step, including calibration batches and filling the prefix cache.

    Args:
        cost: the section of a record.
        unit: `flops` or `seconds`.
        step: the number of optimizer steps.
    """
    before = sum(cost.get(f"{phase}_{unit}") or 0.0 for phase in ("prepare", "prefix_fill"))
    return float(before + (cost[f"train_{unit}"] - before) * step / cost["steps"])


def _positive(value: Any) -> bool:
    """Return whether a value is a number above 0."""
    return (as_number(value) or 0) > 0


def _note(table: Table, rows: Sequence[Row], ends: Sequence[float], given: float | None) -> str:
    """Return the note about the target and the rows that did not reach it."""
    metrics = {main_metric(table.records[row.folders[0]]) for row in rows}
    metric = display_name(*metrics) if len(metrics) == 1 else "main metric"
    targets = f"{ends[0]:.4f}" if ends[0] == ends[-1] else f"{ends[0]:.4f} to {ends[-1]:.4f}, by model and data"
    source = f"full fine-tuning's final {metric} in its worst seed" if given is None else "--target"
    n_missed = sum(STEPS not in row.stats for row in rows)
    missed_note = f"; {n_missed} of {len(rows)} rows did not reach it with every seed" if n_missed else ""
    return f"target: selection {metric} {targets} ({source}){missed_note}"


# -- what was saved, by cause --


def savings(table: Table, row: Row, full: Row) -> dict[str, float] | None:
    """Return the shares of full fine-tuning's FLOPs that each of `CAUSES` saved, and their sum `FLOPs saved`.

    A negative share was added. If the seconds of both rows are recorded, the shares of time that `TIME_CAUSES` saved,
    and their sum `time saved` with the FLOPs, are included. Costs are those to target if both rows reached it, else
    those of whole runs. None if a cost is not recorded.
    """
    to_target = STEPS in row.stats and STEPS in full.stats
    steps, full_steps = (_cost(table, any_row, "steps", to_target) for any_row in (row, full))
    flops, full_flops = (_cost(table, any_row, "train_flops", to_target) for any_row in (row, full))
    if not (flops and full_flops and steps and full_steps):
        return None
    steps_share, idle_share = steps / full_steps, _idle_layers(table, row)
    pairs_share = steps_share * _pairs_a_step(table, row) / _pairs_a_step(table, full)
    fill_flops = _mean_cost(table, row, "prefix_fill_flops")
    token_share, full_token_share = _token_share(table, row), _token_share(table, full)
    padding_ratio = (
        token_share / full_token_share if token_share and full_token_share else 1.0
    )  # of the row's cost with full's padding
    shares = {
        "fewer steps": 1 - steps_share,
        "pairs a step": steps_share - pairs_share,
        "no weight gradients": pairs_share / 3,
        "fewer layers": pairs_share / 3 * idle_share,
        "cached prefix": pairs_share * idle_share / 3 - fill_flops / full_flops if fill_flops else 0.0,
        "less padding": flops / full_flops * (padding_ratio - 1),
    }
    saved = 1 - flops / full_flops
    shares |= {"the adapter itself": saved - sum(shares.values()), SAVED: saved}
    seconds, full_seconds = (_cost(table, any_row, "train_seconds", to_target) for any_row in (row, full))
    if seconds and full_seconds:
        time_saved = 1 - seconds / full_seconds
        precisions_differ = _precision(table, row) != _precision(table, full)
        shares |= dict.fromkeys(TIME_CAUSES, 0.0) | {TIME_CAUSES[not precisions_differ]: time_saved - saved}
        shares[TIME_SAVED] = time_saved
    return shares


def _mean_cost(table: Table, row: Row, key: str) -> float | None:
    """Return the mean of a cost over a row's runs; None if a run has none."""
    costs = [table.records[folder]["cost"].get(key) for folder in row.folders]
    return fmean(costs) if all(map(_positive, costs)) else None


def _cost(table: Table, row: Row, key: str, to_target: bool) -> float | None:
    """Return the mean of a cost, of whole runs or up to the target; None if a run has none."""
    stat = row.stats.get({"steps": STEPS, "train_flops": FLOPS, "train_seconds": SECONDS}[key])
    return (stat.mean if stat else None) if to_target else _mean_cost(table, row, key)


def _pairs_a_step(table: Table, row: Row) -> float:
    """Return the pairs of a step; an objective that passes a pair through the model twice counts it twice."""
    trainer = table.records[row.folders[0]]["config"].get("trainer", {})
    views = 1 if trainer.get("objective", "cross_entropy") in (None, "cross_entropy", "alternate_order") else 2
    size = trainer.get("batch_size", 1)
    return float(views * size if _positive(size) else views)


def _token_share(table: Table, row: Row) -> float | None:
    """Return the share of tokens that are no padding; None if a run does not record it, as older ones."""
    tokens, padding = (_mean_cost(table, row, key) for key in ("train_tokens", "train_padding_tokens"))
    if tokens is None:
        return None
    return 1 - (padding or 0.0) / tokens


def _precision(table: Table, row: Row) -> set[str]:
    """Return the precisions of a row's runs."""
    return {str(table.records[folder]["environment"].get("precision")) for folder in row.folders}


def _idle_layers(table: Table, row: Row) -> float:
    """Return the share of layers below the first adapted one; the highest adapted layer counts as the last."""
    numbers = [
        int(match[1]) for name in table.records[row.folders[0]]["targets"] if (match := re.search(r"\.(\d+)\.", name))
    ]
    return min(numbers) / (max(numbers) + 1) if numbers else 1.0


def readable_savings(table: Table) -> Table | None:
    """Return the savings as a table of texts; None if no row has any."""
    rows = [
        replace(row, keys=row.keys | {name: f"{round(share, 2) + 0.0:+.0%}" for name, share in row.saved.items()}, n=1)
        for row in table.rows
        if row.saved
    ]
    visible_names = {name for row in rows if row.saved for name, share in row.saved.items() if round(share, 2)}
    names = [name for name in (*CAUSES, SAVED, *TIME_CAUSES, TIME_SAVED) if name in visible_names or name == SAVED]
    columns = [*table.keys, *(Column(name, "text", keep=i) for i, name in enumerate(names))]
    return Table(columns, rows) if rows else None
