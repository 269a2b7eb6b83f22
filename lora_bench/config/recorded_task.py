"""The task of a recorded run: its form, its main metric and the names of its classes, read from `run.json`.

Records of older versions are of two classes and their main metric is MCC; they state neither. A record may be damaged:
a value of another type counts as missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_bench.config.metric_names import ALL_MAIN_METRICS, MAIN_METRIC_CHOICES, task_form

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


def recorded_form(record: Mapping[str, Any]) -> str:
    """Return the form of a run's task: `binary`, `multiclass` or `regression`."""
    data_type = _section(record, "data").get("type") or _section(record, "config", "data").get("type")
    return task_form(str(data_type), count_classes(record))


def count_classes(record: Mapping[str, Any]) -> int:
    """Return the number of classes of a run's task; 2 where it is not recorded, as in older records."""
    names = label_names(record)
    if names is not None:
        return max(2, len(names))
    counts = [x for x in _section(record, "data", "label_counts").values() if isinstance(x, list)]
    return max([2, *map(len, counts)])


def label_names(record: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes 0, 1, … of a run's task; None where they are not recorded."""
    for section in (_section(record, "data"), _section(record, "config", "data")):
        names = section.get("label_names")
        if isinstance(names, list) and len(names) >= 2:
            return [str(name) for name in names]
    return None


def positive_label(record: Mapping[str, Any]) -> int:
    """Return the class of two that F1, precision and recall of a run are about: `data.positive_label`, else 1."""
    name, names = _section(record, "config", "data").get("positive_label"), label_names(record) or []
    return names.index(str(name)) if name is not None and str(name) in names else 1


def main_metric(record: Mapping[str, Any]) -> str:
    """Return the metric that chooses between a run's states and settings, one of `ALL_MAIN_METRICS`.

    It is recorded when the run ends. Before, it is `trainer.main_metric`, or the default of the task's form.
    """
    for name in (_section(record, "selection").get("metric"), _section(record, "config", "trainer").get("main_metric")):
        if isinstance(name, str) and name in ALL_MAIN_METRICS:
            return name
    return MAIN_METRIC_CHOICES[recorded_form(record)][0]


def form_of_metrics(names: Collection[str]) -> str:
    """Return the form of the task whose metrics have these names, without a split."""
    return "regression" if "spearman" in names else "multiclass" if "macro_f1" in names else "binary"


def _section(record: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Return a section of a record; empty if it is missing or no mapping."""
    node: Any = record
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}
