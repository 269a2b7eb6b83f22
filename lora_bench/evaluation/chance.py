"""Runs that learned nothing: their MCC or rank correlation is within what guessing gives. Needs no numpy.

MCC decides for every classification task, whatever its main metric is: that of guesses is 0 for any distribution of the
classes, where their accuracy and F1 depend on it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lora_bench.config.metric_names import display_name
from lora_bench.config.recorded_task import count_classes, form_of_metrics, label_names, positive_label

if TYPE_CHECKING:
    from collections.abc import Mapping

LOWEST, HIGHEST = 0.02, 0.1
"""Bounds of the MCC or correlation up to which a run counts as one that learned nothing."""


def chance_level(examples: int | None, classes: int = 2) -> float:
    """Return the MCC up to which predicted classes, or the correlation up to which predicted numbers, count as guessed.

    The MCC of guesses of two classes on N examples has a standard deviation of 1 / sqrt(N) (N MCC² is the chi-squared
    statistic of the confusion table), and so have correlations. For k classes that are about equally frequent it is
    1 / sqrt(N (k - 1)). One in twenty guesses exceeds 1.645 times that. On few examples the bound is 0.1, on many 0.02.

    Args:
        examples: number of examples; None if it is not known.
        classes: k.
    """
    return LOWEST if not examples else min(HIGHEST, max(LOWEST, 1.645 / math.sqrt(examples * (classes - 1))))


def describe_failure(record: Mapping[str, Any], split: str, examples: int | None) -> str | None:
    """Return the reason that a run counts as one that learned nothing, or None.

    A run counts as one if its MCC on the split, or for a regression Spearman's correlation, is at most the
    `chance_level`. Without such a metric it does not.

    Args:
        record: the content of `run.json`, with metrics by `<split>/<metric>`.
        split: the split to judge by.
        examples: its number of examples; None if it is not known, which is judged like a large number.
    """
    metrics = record["metrics"]
    names = {key.rpartition("/")[2] for key in metrics if key.rpartition("/")[0] == split}
    form = form_of_metrics(names)
    metric = "spearman" if form == "regression" else "mcc"
    value = metrics.get(f"{split}/{metric}")
    level = chance_level(examples, count_classes(record) if form == "multiclass" else 2)
    if not isinstance(value, int | float) or isinstance(value, bool) or value > level:
        return None
    if value == 0 and form == "regression":
        return "it predicts the same number for every example"
    label = _only_predicted_label(record, split) if value == 0 else None
    if label is not None:
        return f"it predicts label {label} for every example"
    return f"its {split} {display_name(metric)} of {value:.3f} is not above chance"


def _only_predicted_label(record: Mapping[str, Any], split: str) -> str | None:
    """Return the name of the class that a run predicts for every example; None if it predicts several, or unknown.

    Two classes are judged by the recall of the positive one. More classes have an entry each in `per_class`: that of
    the only predicted one has a recall of 1, and as its precision its share of the examples.
    """
    recall = record["metrics"].get(f"{split}/recall")
    if recall in (0, 1):
        positive = positive_label(record)
        label = positive if recall == 1 else 1 - positive
        return dict(enumerate(label_names(record) or [])).get(label, str(label))
    of_split = record["per_class"].get(split) if isinstance(record.get("per_class"), dict) else None
    entries: dict[str, Any] = of_split if isinstance(of_split, dict) else {}
    keys = ("precision", "recall", "support")
    values: dict[str, list[Any]] = {
        name: [entry.get(key) for key in keys] for name, entry in entries.items() if isinstance(entry, dict)
    }
    if not all(isinstance(value, int | float) for of_class in values.values() for value in of_class):
        return None
    examples = sum(support for _, _, support in values.values())
    for name, (precision, recall, support) in values.items():
        if recall == 1 and math.isclose(precision * examples, support):
            return name
    return None


def failure_notes(record: Mapping[str, Any]) -> list[str]:
    """Return a note for each reported split on which a finished run, or a task of it, learned nothing.

    Args:
        record: the content of `run.json`.
    """
    metrics, rows = record["metrics"], record["data"].get("rows")
    notes = []
    for prefix in (key.rpartition("/")[0] for key in metrics if key.endswith(("/mcc", "/spearman"))):
        split, _, task = prefix.partition("/")
        if split in ("train", "selection") or (task and task not in record["config"].get("tasks", {})):
            continue
        examples = rows.get(prefix, rows.get(split)) if isinstance(rows, dict) else None
        reason = describe_failure(record, prefix, examples if isinstance(examples, int) else None)
        if reason is not None:
            subject = f"the run learned nothing of {task}" if task else "the run learned nothing"
            notes.append(f"{subject}: {reason}. Try another optimizer.lr, more steps, or more data.")
    return notes
