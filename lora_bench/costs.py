"""What a row takes on disk, what it cost to reach what full fine-tuning reaches, and which cause saved how much of it.

The target is the selection MCC that full fine-tuning of the same model on the same data ends with, in its worst seed,
or one that is given. FLOPs to target are those of the whole training, by its share of the steps.

A step of full fine-tuning is a third forward, a third gradients of inputs, a third gradients of weights. An adapter
saves the last third; one that leaves the lowest m of L layers alone saves m / L of the second, and where what they make
is kept, m / L of the first, less what making it once takes. What batches pad less goes by their tokens. What is left
over is what the adapter computes itself.

Seconds are FLOPs by a rate: what of the time was saved beyond the FLOPs is the precision's, where the two differ in it,
or else the rate's: of the machine, and of small products.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_bench.tables import Column, Stat, Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.tables import Row

STEPS, FLOPS = "steps_to_target", "flops_to_target"
BYTES = "adapter_bytes"
COLUMNS = (Column(BYTES, "bytes"), Column(STEPS, "count"), Column(FLOPS, "flops"))
SAVED = "FLOPs saved"
CAUSES = ("fewer steps", "no weight gradients", "fewer layers", "cached prefix", "less padding", "the adapter itself")
TIME_SAVED = "time saved"
TIME_CAUSES = ("precision", "rate")


def with_costs(table: Table, target: float | None = None) -> Table:
    """The table with bytes on disk, steps and FLOPs to target, and what was saved against full fine-tuning.

    Args:
        table: rows, and the records of their runs.
        target: a selection MCC; None takes what full fine-tuning ends with, where the table has it.
    """
    rows = [_on_disk(row) for row in table.rows]
    full: dict[Any, int] = {}
    for i, row in enumerate(rows):
        if _choice(table, row, "adapter") == "full":
            full.setdefault(_kind(table, row), i)  # of several the best, which comes first
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
            sizes.append(_bytes(folder / "adapter"))
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


def _looks(folder: Path) -> list[tuple[int, float]]:
    """Step and MCC of each look at the selection split."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            look = json.loads(line)
            if look["split"] == "selection":
                found.append((int(look["step"]), float(look["metrics"]["mcc"])))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # cut off, or somebody else's
            continue
    return sorted(found)


def _to_target(table: Table, row: Row, target: float) -> Row:
    """The row with steps and FLOPs to target, where every seed reached it."""
    steps, flops = [], []
    for folder in row.folders:
        reached = next((step for step, mcc in _looks(folder) if mcc >= target), None)
        cost = table.records[folder]["cost"]
        if reached is None or not _positive(cost.get("steps")) or not _positive(cost.get("train_flops")):
            return row
        steps.append(float(reached))
        flops.append(cost["train_flops"] * reached / cost["steps"])
    stats = {STEPS: Stat(fmean(steps), None, row.n), FLOPS: Stat(fmean(flops), None, row.n)}
    return replace(row, stats=row.stats | stats)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


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
    flops, full_flops = (_per_step(table, each, "train_flops") for each in (row, full))
    steps, full_steps = (_mean_cost(table, each, "steps") for each in (row, full))
    if not (flops and full_flops and steps and full_steps):
        return None
    if STEPS in row.stats and STEPS in full.stats:
        steps, full_steps = row.stats[STEPS].mean, full.stats[STEPS].mean
    length, idle = steps / full_steps, _idle_layers(table, row)
    filled = _per_step(table, row, "prefix_fill_flops")
    used, full_used = _token_share(table, row), _token_share(table, full)
    more_padding = used / full_used if used and full_used else 1.0  # of mine, had I padded as it did
    shares = {
        "fewer steps": 1 - length,
        "no weight gradients": length / 3,
        "fewer layers": length / 3 * idle,
        "cached prefix": length * (idle / 3 - filled / full_flops) if filled else 0.0,
        "less padding": length * flops / full_flops * (more_padding - 1),
    }
    saved = 1 - length * flops / full_flops
    shares |= {"the adapter itself": saved - sum(shares.values()), SAVED: saved}
    seconds, full_seconds = (_per_step(table, each, "train_seconds") for each in (row, full))
    if seconds and full_seconds:
        time_saved = 1 - length * seconds / full_seconds
        differ = _precision(table, row) != _precision(table, full)
        shares |= dict.fromkeys(TIME_CAUSES, 0.0) | {TIME_CAUSES[not differ]: time_saved - saved}
        shares[TIME_SAVED] = time_saved
    return shares


def _mean_cost(table: Table, row: Row, key: str) -> float | None:
    """The mean over a row's runs; None where one of them has none."""
    costs = [table.records[folder]["cost"].get(key) for folder in row.folders]
    return fmean(costs) if all(map(_positive, costs)) else None


def _per_step(table: Table, row: Row, key: str) -> float | None:
    """The mean of a cost by the steps of its run; None where one of the runs has none."""
    costs = [table.records[folder]["cost"] for folder in row.folders]
    if not all(_positive(cost.get("steps")) and _positive(cost.get(key)) for cost in costs):
        return None
    return fmean(cost[key] / cost["steps"] for cost in costs)


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
        replace(row, keys=row.keys | {name: f"{share:+.0%}" for name, share in row.saved.items()}, n=1)
        for row in table.rows
        if row.saved
    ]
    told = {name for row in rows if row.saved for name, share in row.saved.items() if share}
    names = [name for name in (*CAUSES, SAVED, *TIME_CAUSES, TIME_SAVED) if name in told or name == SAVED]
    columns = [*table.keys, *(Column(name, "text", keep=i) for i, name in enumerate(names))]
    return Table(columns, rows) if rows else None
