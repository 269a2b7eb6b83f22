"""Columns of a comparison: metrics of the reported splits, intervals and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.table import Column
from lora_bench.config.metric_names import MAIN_METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.analysis.settings import RecordedRun

OTHER_METRICS = ("precision", "recall", "auroc", "nll", "ece", "brier")
"""Standard metrics without a column; they stay in run.json. Main metrics and configured ones have columns."""

STRESS_COLUMNS = {
    "unseen/f1": "↑",
    "unseen/mcc": "↑",
    "perturbed/f1": "↑",
    "perturbed/f1_drop": "↓",
    "perturbed/flip_rate": "↓",
    "perturbed/attack_success": "↓",
    "perturbed/order_consistency": "↑",
    "members/mcc": "↑",
}
"""Metrics with a column in addition to the main ones, named without the split; the arrow is the better direction."""

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


def has_column(name: str) -> bool:
    """Return whether a metric, named without its split, has a column.

    Every metric of the split itself may have one; of its stress splits and members only those in `STRESS_COLUMNS`.
    """
    return "/" not in name or name in STRESS_COLUMNS


def cost_columns() -> dict[str, Column]:
    """Return a column for each cost, by its key in run.json."""
    return {name: Column(name, unit, keep=KEEP.index(name)) for name, unit in COSTS.items()}


def metric_columns(runs: Sequence[RecordedRun], splits: Sequence[str]) -> dict[str, Column]:
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
            keep = len(KEEP) + 9 * (len(splits) - i) + rank
            columns[f"{split}/{name}"] = Column(header, "metric", _arrow(name, runs), keep=keep)
    return columns


def _arrow(name: str, runs: Sequence[RecordedRun]) -> str:
    """Return the better direction of a metric, named without its split; empty if it is not known."""
    if name in MAIN_METRICS:
        return "↑"
    directions = {run.keys.get(f"metric.{name}.direction", _default_direction(name, run)) for run in runs}
    return "↑" if "up" in directions else "↓" if "down" in directions else STRESS_COLUMNS.get(name, "")


def _default_direction(name: str, run: RecordedRun) -> str | None:
    """Return the direction of a metric of a run whose config gives none: `up`; None if it is no metric of the run's."""
    is_configured = any(f"metric.{name}.{source}" in run.keys for source in ("torchmetric", "function"))
    return "up" if is_configured else None
