"""What a row takes on disk, what it cost to reach what full fine-tuning reaches, and which cause saved how much of it.

The target is the selection MCC that full fine-tuning of the same model on the same data ends with, in its worst seed,
or one that is given. FLOPs and seconds to target are those of the steps up to it, and all that came before the first
step. With `trainer.stop_at` that is the whole run.

A step of full fine-tuning is a third forward, a third gradients of inputs, a third gradients of weights. An adapter
saves the last third; one that leaves the lowest m of L layers alone saves m / L of the second, and where what they make
is kept, m / L of the first, less what making it once takes. What batches pad less goes by their tokens, what a
step takes in beyond full fine-tuning's by its pairs: an objective that looks at each pair twice has twice as many. What
is left over is what the adapter computes itself, its start with it.

Seconds are FLOPs by a rate: what of the time was saved beyond the FLOPs is the precision's, where the two differ in it,
or else the rate's: of the machine, and of small products.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_bench.analysis.significance import BASELINE
from lora_bench.analysis.table import Column, Stat, Table
from lora_bench.files.untrusted import as_number
from lora_bench.records.metrics_log import selection_curve
from lora_bench.records.run_folder import ADAPTER, METRICS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.analysis.table import Row

STEPS, FLOPS, SECONDS = "steps_to_target", "flops_to_target", "seconds_to_target"
BYTES = "adapter_bytes"
COLUMNS = (Column(BYTES, "bytes"), Column(STEPS, "count"), Column(FLOPS, "flops"), Column(SECONDS, "seconds"))
SAVED = "FLOPs saved"
CAUSES = (
    *("fewer steps", "pairs a step", "no weight gradients", "fewer layers", "cached prefix", "less padding"),
    "the adapter itself",
)
TIME_SAVED = "time saved"
TIME_CAUSES = ("precision", "rate")


def with_costs(table: Table, target: float | None = None) -> Table:
    """The table with bytes on disk, steps and FLOPs to target, and what was saved against full fine-tuning.

    Of several rows of full fine-tuning it is the one that the verdicts are against, else the best.

    Args:
        table: rows with their findings, and the records of their runs.
        target: a selection MCC; None takes what full fine-tuning ends with, where the table has it.
    """
    rows = [_on_disk(row) for row in table.rows]
    full: dict[Any, int] = {}
    for i, row in enumerate(rows):
        if _choice(table, row, "adapter") == "full":
            kind = _kind(table, row)
            full.setdefault(kind, i)  # the best comes first
            if row.finding and row.finding.verdict == BASELINE:
                full[kind] = i
    targets = {kind: target or _end(rows[i]) for kind, i in full.items()}
    for i, row in enumerate(rows):
        wanted = target or targets.get(_kind(table, row))
        rows[i] = row if wanted is None else _to_target(table, row, wanted)
    for i, row in enumerate(rows):
        baseline = full.get(_kind(table, row), i)
        if baseline != i and _choice(table, row, "adapter") != "full":
            rows[i] = replace(row, saved=savings(table, row, rows[baseline]))
    found = replace(table, rows=rows, columns=[*table.columns, *COLUMNS])
    ends = sorted({end for end in targets.values() if end is not None}) if target is None else [target]
    notes = [_note(rows, ends, target)] if ends else []
    return replace(found, savings=_for_people(found), notes=table.notes + notes)


def _on_disk(row: Row) -> Row:
    """The row with the mean size of what its runs would be loaded from."""
    sizes = []
    for folder in row.folders:
        try:
            sizes.append(_bytes(folder / ADAPTER))
        except OSError:
            return row
    return replace(row, stats=row.stats | {BYTES: Stat(fmean(sizes), None, row.n)})


def _bytes(folder: Path | os.DirEntry[str]) -> float:
    """Of all files in it; an ensemble has a folder for each member."""
    with os.scandir(folder) as found:
        return float(sum(_bytes(each) if each.is_dir() else each.stat().st_size for each in found))


def _end(row: Row) -> float | None:
    """The selection MCC that its worst seed ends with."""
    looks = [_looks(folder) for folder in row.folders]
    return min(each[-1][1] for each in looks) if all(looks) else None


def _choice(table: Table, row: Row, group: str) -> Any:
    return table.records[row.folders[0]]["choices"].get(group)


def _kind(table: Table, row: Row) -> tuple[Any, ...]:
    """What must be equal for the costs of two rows to be compared."""
    record = table.records[row.folders[0]]
    fingerprint = record["data"].get("fingerprint")
    selection = fingerprint.get("selection") if isinstance(fingerprint, dict) else None
    return row.data, record["choices"].get("model"), str(selection)


def _looks(folder: Path) -> list[tuple[float, float]]:
    """Return (step, MCC) of each evaluation of the selection split."""
    return selection_curve(folder / METRICS_FILE, "mcc")


def _to_target(table: Table, row: Row, target: float) -> Row:
    """The row with steps, FLOPs and seconds to target, where every seed reached it and as far as its runs tell."""
    found: dict[str, list[float]] = {STEPS: [], FLOPS: [], SECONDS: []}
    for folder in row.folders:
        reached = next((step for step, mcc in _looks(folder) if mcc >= target), None)
        cost = table.records[folder]["cost"]
        if reached is None or not _positive(cost.get("steps")) or not _positive(cost.get("train_flops")):
            return row
        found[STEPS].append(reached)
        for name, unit in ((FLOPS, "flops"), (SECONDS, "seconds")):
            if _positive(cost.get(f"train_{unit}")):
                found[name].append(up_to(cost, unit, reached))
    stats = {name: Stat(fmean(each), None, row.n) for name, each in found.items() if len(each) == len(row.folders)}
    return replace(row, stats=row.stats | stats)


def up_to(cost: dict[str, Any], unit: str, step: float) -> float:
    """FLOPs or seconds of the steps up to this one, and of what came before: looking at data, filling the prefix."""
    before = sum(cost.get(f"{what}_{unit}") or 0.0 for what in ("prepare", "prefix_fill"))
    return float(before + (cost[f"train_{unit}"] - before) * step / cost["steps"])


def _positive(value: Any) -> bool:
    return (as_number(value) or 0) > 0


def _note(rows: Sequence[Row], ends: Sequence[float], given: float | None) -> str:
    what = f"{ends[0]:.4f}" if ends[0] == ends[-1] else f"{ends[0]:.4f} to {ends[-1]:.4f}, by model and data"
    whose = "what full fine-tuning ends with in its worst seed" if given is None else "as asked"
    missed = sum(STEPS not in row.stats for row in rows)
    late = f"; {missed} of {len(rows)} rows did not reach it with every seed" if missed else ""
    return f"target: selection MCC {what} ({whose}){late}"


# -- what was saved, by cause --


def savings(table: Table, row: Row, full: Row) -> dict[str, float] | None:
    """Shares of full fine-tuning's FLOPs that each of `CAUSES` saved, and `FLOPs saved`, their sum; negative: added.

    And where the seconds of both are known, what `TIME_CAUSES` saved of its time, and `time saved`, all of it together.
    Both up to the target where both reach it, else both whole runs.
    """
    to_target = STEPS in row.stats and STEPS in full.stats
    steps, full_steps = (_cost(table, each, "steps", to_target) for each in (row, full))
    flops, full_flops = (_cost(table, each, "train_flops", to_target) for each in (row, full))
    if not (flops and full_flops and steps and full_steps):
        return None
    length, idle = steps / full_steps, _idle_layers(table, row)
    work = length * _pairs_a_step(table, row) / _pairs_a_step(table, full)
    filled = _mean_cost(table, row, "prefix_fill_flops")
    used, full_used = _token_share(table, row), _token_share(table, full)
    more_padding = used / full_used if used and full_used else 1.0  # of mine, had I padded as it did
    shares = {
        "fewer steps": 1 - length,
        "pairs a step": length - work,
        "no weight gradients": work / 3,
        "fewer layers": work / 3 * idle,
        "cached prefix": work * idle / 3 - filled / full_flops if filled else 0.0,
        "less padding": flops / full_flops * (more_padding - 1),
    }
    saved = 1 - flops / full_flops
    shares |= {"the adapter itself": saved - sum(shares.values()), SAVED: saved}
    seconds, full_seconds = (_cost(table, each, "train_seconds", to_target) for each in (row, full))
    if seconds and full_seconds:
        time_saved = 1 - seconds / full_seconds
        differ = _precision(table, row) != _precision(table, full)
        shares |= dict.fromkeys(TIME_CAUSES, 0.0) | {TIME_CAUSES[not differ]: time_saved - saved}
        shares[TIME_SAVED] = time_saved
    return shares


def _mean_cost(table: Table, row: Row, key: str) -> float | None:
    """The mean over a row's runs; None where one of them has none."""
    costs = [table.records[folder]["cost"].get(key) for folder in row.folders]
    return fmean(costs) if all(map(_positive, costs)) else None


def _cost(table: Table, row: Row, key: str, to_target: bool) -> float | None:
    """The mean of a cost, of the whole runs or up to the target; None where one of the runs has none."""
    stat = row.stats.get({"steps": STEPS, "train_flops": FLOPS, "train_seconds": SECONDS}[key])
    return (stat.mean if stat else None) if to_target else _mean_cost(table, row, key)


def _pairs_a_step(table: Table, row: Row) -> float:
    """Those that a step goes through, a pair that it looks at twice counted twice."""
    trainer = table.records[row.folders[0]]["config"].get("trainer", {})
    looks = 1 if trainer.get("objective", "cross_entropy") in ("cross_entropy", "either_order") else 2
    size = trainer.get("batch_size", 1)
    return float(looks * size if _positive(size) else looks)


def _token_share(table: Table, row: Row) -> float | None:
    """The share of the tokens that were no padding; None where a run does not tell, as older ones."""
    tokens, padding = (_mean_cost(table, row, key) for key in ("train_tokens", "train_padding_tokens"))
    if tokens is None:
        return None
    return 1 - (padding or 0.0) / tokens


def _precision(table: Table, row: Row) -> set[str]:
    return {str(table.records[folder]["environment"].get("precision")) for folder in row.folders}


def _idle_layers(table: Table, row: Row) -> float:
    """The share of the layers below the first adapted one; the highest layer is taken to be adapted."""
    numbers = [
        int(found[1]) for name in table.records[row.folders[0]]["targets"] if (found := re.search(r"\.(\d+)\.", name))
    ]
    return min(numbers) / (max(numbers) + 1) if numbers else 1.0


def _for_people(table: Table) -> Table | None:
    rows = [
        replace(row, keys=row.keys | {name: f"{round(share, 2) + 0.0:+.0%}" for name, share in row.saved.items()}, n=1)
        for row in table.rows
        if row.saved
    ]
    told = {name for row in rows if row.saved for name, share in row.saved.items() if round(share, 2)}
    names = [name for name in (*CAUSES, SAVED, *TIME_CAUSES, TIME_SAVED) if name in told or name == SAVED]
    columns = [*table.keys, *(Column(name, "text", keep=i) for i, name in enumerate(names))]
    return Table(columns, rows) if rows else None
