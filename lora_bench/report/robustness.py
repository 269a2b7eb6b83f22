"""Robustness: the change of the main metric where texts are perturbed, or on other data."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_bench.report import axes, folders
from lora_bench.report.charts import Lane, Mark, draw_lanes, legend
from lora_bench.report.html import Content, Markup, element, figure, join, table
from lora_bench.report.tradeoffs import column_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_bench.records.evaluations import Evaluation
    from lora_bench.report.series import Block, Entry

TABLE_ROWS = 60
"""Rows of the table that are shown."""
LANES = 16
"""Conditions that are drawn: those with the largest falls of the drawn experiments."""


def robustness(block: Block) -> Markup | None:
    """Return the section with the main metric on other data and perturbed texts; None if no run has such scores.

    Each change is relative to the same runs on the data before.
    """
    metric = block.main.name.rsplit("/", 1)[-1]
    changes: Changes = [
        (entry, condition, pairs)
        for entry in block.entries
        for condition, pairs in _pairs_by_condition(entry, metric).items()
    ]
    if not changes:
        return None
    rows: list[list[Content]] = []
    for entry, condition, pairs in changes[:TABLE_ROWS]:
        before, after = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
        change = f"{after - before:+.4f}".replace("-", "−")
        rows.append([entry.name, condition, len(pairs), before, after, change])
    title = f"Change of {column_name(block.main)} on perturbed texts and on other data"
    limit_note = f" The first {TABLE_ROWS} of {len(changes)} rows are shown." if len(changes) > TABLE_ROWS else ""
    header = ["experiment", "condition", "runs", "before", "after", "change"]
    numbers = join([element("p", limit_note, class_="note") if limit_note else "", table(title, header, rows)])
    marks_by_condition = _marks_by_condition(block, changes)
    if not marks_by_condition:
        return numbers
    conditions = sorted(
        marks_by_condition, key=lambda condition: fmean(mark.value for mark in marks_by_condition[condition])
    )
    caption = f"{block.chosen_how} Left of 0: worse than the same runs on unperturbed texts or the reported split."
    caption = caption.strip()
    if len(conditions) > LANES:
        caption += f" The {LANES} of {len(conditions)} conditions with the largest falls are drawn."
    drawn_lanes = [Lane(condition, marks_by_condition[condition]) for condition in conditions[:LANES]]
    x = axes.linear([0.0, *(mark.value for lane in drawn_lanes for mark in lane.marks)], "points →")
    chart = draw_lanes(x, drawn_lanes, f"{title}. {caption}")
    rows_drawn = {mark.row for lane in drawn_lanes for mark in lane.marks}
    key = legend([(entry.series, entry.name) for entry in block.chosen if entry.number in rows_drawn])
    return join([key, figure(chart, caption, numbers, title=title, class_="wide")])


Changes: TypeAlias = "list[tuple[Entry, str, list[tuple[float, float]]]]"
"""Experiment, condition (a perturbation or other data), and the metric before and after for each run scored there."""


def _marks_by_condition(block: Block, changes: Changes) -> dict[str, list[Mark]]:
    """Return the changes of the chosen experiments in points, by condition."""
    chosen = {entry.number for entry in block.chosen}
    marks: dict[str, list[Mark]] = {}
    for entry, condition, pairs in changes:
        if entry.number in chosen:
            change = 100 * fmean(after - before for before, after in pairs)
            mark = Mark(change, entry.series, f"{entry.name}, {condition}: {change:+.1f}", entry.number)
            marks.setdefault(condition, []).append(mark)
    return marks


def _pairs_by_condition(entry: Entry, metric: str) -> dict[str, list[tuple[float, float]]]:
    """Return the metric before and after for each run that was scored under a condition, by condition."""
    pairs_by_condition: dict[str, list[tuple[float, float]]] = {}
    for folder, record in entry.runs:
        for condition, before, after in _scores_of_run(record, folders.evaluations_by_name(folder), metric):
            pairs_by_condition.setdefault(condition, []).append((before, after))
    return pairs_by_condition


def _scores_of_run(
    record: Mapping[str, Any], evaluations: Mapping[str, Evaluation], metric: str
) -> Iterator[tuple[str, float, float]]:
    """Yield condition, metric before and metric after for a run's later evaluations.

    Perturbed texts are compared with the same data unperturbed, other data with the reported split.
    """
    metrics, fingerprints = record["metrics"], record["data"].get("fingerprint")
    values = (metrics.get(f"{split}/{metric}") for split in ("validation", "test", "selection"))
    reported = next((value for value in values if isinstance(value, float)), None)
    for name, evaluation in evaluations.items():
        for key, after in evaluation.metrics.items():
            split, _, perturbed_metric = key.partition("/")
            perturbation, _, metric_name = perturbed_metric.rpartition("/")
            before = evaluation.metrics.get(f"{split}/{metric}")
            if metric_name != metric or before is None:
                continue
            fingerprint = evaluation.fingerprints.get(split)
            same_data = (
                fingerprint is not None and isinstance(fingerprints, dict) and fingerprints.get(split) == fingerprint
            )
            split_suffix = "" if split == "validation" else f" ({split})"
            if perturbation:
                condition = f"{perturbation}{split_suffix}" if same_data else f"{name}{split_suffix}: {perturbation}"
                yield condition, before, after
            elif not same_data and reported is not None:
                yield f"{name}{split_suffix}", reported, after
