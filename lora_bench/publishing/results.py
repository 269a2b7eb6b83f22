"""The results of a published run: metrics of the reported splits, with intervals where predictions allow them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_bench.analysis.bootstrap import bootstrap_interval
from lora_bench.analysis.columns import STANDARD_METRICS
from lora_bench.config.metric_names import MAIN_METRIC_CHOICES
from lora_bench.files.untrusted import as_number
from lora_bench.records.predictions import read_if_usable

if TYPE_CHECKING:
    from lora_bench.records.finished_record import FinishedRecord

_TOLERANCE = 1e-4
"""Largest difference between a recorded metric and that of the predictions: records of torchmetrics are in fp32."""


class Result(NamedTuple):
    """A metric of a run on one split."""

    split: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    """The 95 % bootstrap interval over the examples; None for a metric without one, or without predictions."""


def read_results(finished: FinishedRecord) -> list[Result]:
    """Return the standard metrics of the reported splits, in the order of tables.

    Metrics that can be tested have an interval. It is left out if the split's predictions are missing, damaged, or not
    those that the record was computed from.
    """
    metrics = finished.record["metrics"]
    names_by_split: dict[str, set[str]] = {}
    for key in metrics:
        split, _, name = key.partition("/")
        names_by_split.setdefault(split, set()).add(name)
    results = []
    for split in sorted(names_by_split.keys() - {"selection"}):
        predictions = read_if_usable(finished.folder, split)
        for name in STANDARD_METRICS[finished.form]:
            value = as_number(metrics.get(f"{split}/{name}"))
            if value is None:
                continue
            interval = None
            if predictions is not None and predictions.form == finished.form:
                has_interval = name in MAIN_METRIC_CHOICES[finished.form]
                if has_interval and abs(predictions.value(name) - value) <= _TOLERANCE:
                    interval = bootstrap_interval(predictions.labels, predictions.predicted, name)
            results.append(Result(split, name, float(value), interval))
    return results
