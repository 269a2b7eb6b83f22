"""Columns of a comparison: metrics of the reported splits, intervals and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis import savings
from lora_bench.analysis.table import Column
from lora_bench.config.metric_names import SHOWN_METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.analysis.settings import RecordedRun

STANDARD_METRICS = {
    "binary": (*SHOWN_METRICS["binary"], "precision", "recall", "auroc", "nll", "ece", "brier"),
    "multiclass": (*SHOWN_METRICS["multiclass"], "weighted_f1", "auroc", "nll", "ece", "brier"),
    "regression": (*SHOWN_METRICS["regression"], "mae", "r2"),
}
"""Metrics of every run by form of task. Those in `SHOWN_METRICS`, and the tested one, have a column; the others stay in
run.json. Configured metrics have columns too."""
LOWER_IS_BETTER = ("mse", "mae", "nll", "ece", "brier")

STRESS_COLUMNS = {
    "unseen/f1": "↑",
    "unseen/mcc": "↑",
    "perturbed/f1": "↑",
    "perturbed/f1_drop": "↓",
    "perturbed/flip_rate": "↓",
    "perturbed/mean_change": "↓",
    "perturbed/attack_success": "↓",
    "perturbed/order_consistency": "↑",
    "members/mcc": "↑",
    **{f"{part}/{name}": "↑" for name in ("macro_f1", "spearman") for part in ("unseen", "perturbed", "members")},
    **{f"perturbed/{name}_drop": "↓" for name in ("macro_f1", "spearman")},
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


RESERVED = ("n", "chosen", "recommended", "learned_nothing", "runs", *(column.name for column in savings.COLUMNS))
"""Names of columns of CSV and JSON, which a metric of the same name does not take: its header names the split."""


def has_column(name: str) -> bool:
    """Return whether a metric, named without its split, has a column.

    Every metric of the split itself may have one; of its stress splits and members only those in `STRESS_COLUMNS`.
    """
    return "/" not in name or name in STRESS_COLUMNS


def cost_columns() -> dict[str, Column]:
    """Return a column for each cost, by its key in run.json."""
    return {name: Column(name, unit, keep=KEEP.index(name)) for name, unit in COSTS.items()}


def metric_columns(runs: Sequence[RecordedRun], splits: Sequence[str], measure: str | None = None) -> dict[str, Column]:
    """Return a column for each `split/metric` of run.json; its header names the split where it is not obvious.

    Args:
        runs: the runs of the table.
        splits: the reported splits, the main one first.
        measure: a metric to show in addition to those that the forms of task, and the main metrics, ask for.
    """
    columns = {}
    forms = [form for form in SHOWN_METRICS if any(run.form == form for run in runs)] or ["binary"]
    always = [name for form in forms for name in SHOWN_METRICS[form]] + [run.main_metric for run in runs]
    main_metrics = {run.main_metric for run in runs}
    names = list(dict.fromkeys([*always, *([measure] if measure else [])]))
    recorded = sorted({key for run in runs for key in run.record["metrics"]})
    extra_keys = {key for run in runs for key in _extra_keys(run)}
    own_splits = [split for split in splits if ":" not in split]  # the rest are later evaluations on other data
    for i, split in enumerate(splits):
        extra = [key.removeprefix(f"{split}/") for key in recorded if key.startswith(f"{split}/") and key in extra_keys]
        extra = [name for name in extra if name not in names and has_column(name)]
        main = [name for name in names if split in own_splits or f"{split}/{name}" in recorded]
        for name in [*main, *extra]:
            names_split = own_splits != [split] or split == "selection" or _is_taken(name, runs)
            header = f"{split}/{name}" if names_split else name
            rank = names.index(name) if name in names else -1
            rank += len(names) if name in main_metrics else 0  # a narrow table keeps one metric of each row
            keep = len(KEEP) + 2 * (len(names) + 1) * (len(splits) - i) + rank
            columns[f"{split}/{name}"] = Column(header, "metric", _arrow(name, runs, forms), keep=keep)
    return columns


def _is_taken(name: str, runs: Sequence[RecordedRun]) -> bool:
    """Return whether a metric, named without its split, could have the name of another column.

    Names with a dot are those of configuration keys, costs, tests and savings; the endings are those of a spread.
    """
    is_spread = name.endswith(("_std", "_low", "_high"))
    return "." in name or is_spread or name in RESERVED or any(name in run.keys for run in runs)


def _extra_keys(run: RecordedRun) -> list[str]:
    """Return the `split/metric` of a run's metrics that not every run of its form has."""
    standard = STANDARD_METRICS[run.form]
    return [key for key in run.record["metrics"] if key.partition("/")[2] not in standard]


def _arrow(name: str, runs: Sequence[RecordedRun], forms: Sequence[str]) -> str:
    """Return the better direction of a metric, named without its split; empty if it is not known."""
    if any(name in STANDARD_METRICS[form] for form in forms):
        return "↓" if name in LOWER_IS_BETTER else "↑"
    directions = {run.keys.get(f"metric.{name}.direction", _default_direction(name, run)) for run in runs}
    return "↑" if "up" in directions else "↓" if "down" in directions else STRESS_COLUMNS.get(name, "")


def _default_direction(name: str, run: RecordedRun) -> str | None:
    """Return the direction of a metric of a run whose config gives none: `up`; None if it is no metric of the run's."""
    is_configured = any(f"metric.{name}.{source}" in run.keys for source in ("torchmetric", "function"))
    return "up" if is_configured else None
