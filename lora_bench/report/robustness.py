"""Robustness: the change of the main metric where texts are perturbed, or on other data."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_bench.records.evaluations import TITLES
from lora_bench.report import folders, specs
from lora_bench.report.blocks import column_name
from lora_bench.report.content import DataTable, Figure, Paragraph, signed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lora_bench.records.evaluations import Evaluation
    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

TABLE_ROWS = 60
"""Rows of the table that are shown."""
LANES = 16
"""Conditions that are drawn: those with the largest falls of the drawn settings."""

Changes: TypeAlias = "list[tuple[Entry, str, list[tuple[float, float]]]]"
"""Setting, condition (a perturbation or other data), and the metric before and after for each run scored there."""


def robustness(block: Block) -> list[Content]:
    """Return the main metric on other data and perturbed texts; empty if no run has such scores.

    Each change is relative to the same runs on the data before.
    """
    ordered = [*block.chosen, *(entry for entry in block.entries if entry not in block.chosen)]
    changes: Changes = [
        (entry, condition, pairs)
        for entry in ordered
        for condition, pairs in _pairs_by_condition(entry, block.metric).items()
    ]
    if not changes:
        return []
    rows: list[list[Cell]] = []
    for entry, condition, pairs in changes[:TABLE_ROWS]:
        before, after = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
        rows.append([entry.name, condition, len(pairs), before, after, signed(after - before)])
    title = f"Change of {column_name(block.main)} on perturbed texts and on other data"
    header = ["setting", "condition", "runs", "before", "after", "change"]
    limit_note = f"The first {TABLE_ROWS} of {len(changes)} rows are shown."
    notes: list[Content] = [Paragraph(limit_note)] if len(changes) > TABLE_ROWS else []
    numbers = DataTable(title, header, rows)
    figure = _figure(block, changes, title)
    return [*([figure] if figure else []), *notes, numbers]


def _figure(block: Block, changes: Changes, title: str) -> Figure | None:
    """Return the changes of the chosen settings in points; None if none of them has any."""
    series = {entry.number: block.series_name(entry) for entry in block.chosen}
    values: dict[str, list[dict[str, Any]]] = {}
    for entry, condition, pairs in changes:
        if entry.number in series:
            change = 100 * fmean(after - before for before, after in pairs)
            tip = f"{entry.name}, {condition}: {signed(change, 1)} points"
            values.setdefault(condition, []).append({"value": change, "series": series[entry.number], "tip": tip})
    if not values:
        return None
    conditions = sorted(values, key=lambda condition: fmean(value["value"] for value in values[condition]))
    caption = f"{block.chosen_note} Left of 0: worse than the same runs on unperturbed texts or the reported split."
    if len(conditions) > LANES:
        caption += f" The {LANES} of {len(conditions)} conditions with the largest falls are drawn."
    drawn = conditions[:LANES]
    return Figure(title, caption.strip(), _lanes(block, {name: values[name] for name in drawn}), style="wide")


def _lanes(block: Block, values: Mapping[str, Sequence[dict[str, Any]]]) -> specs.Spec:
    """Return the specification of changes with a lane for each condition."""
    labels, lines = specs.labels(list(values), [[condition] for condition in values])
    points = [value | {"label": labels[condition]} for condition, marks in values.items() for value in marks]
    x = specs.quantity("value", "points", axis=specs.SIGNED, scale={"zero": True})
    zero = {"data": {"values": [{"value": 0}]}, "mark": {"type": "rule", "stroke": "var(--soft)"}, "encoding": {"x": x}}
    marks = {
        "mark": {"type": "point", "filled": True, "opacity": 0.9, "size": 110},
        "encoding": {
            "x": x,
            "y": specs.lanes(list(labels.values()), lines),
            **specs.series_channels(block.series),
            "tooltip": specs.TIP,
        },
    }
    height = specs.lane_height(lines) * len(labels)
    return specs.chart(points, [zero, marks], height=height, **specs.legend_width(block.series))


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
            title = record.get(TITLES, {}).get(f"{name}:{split}", name)
            fingerprint = evaluation.fingerprints.get(split)
            same_data = (
                fingerprint is not None and isinstance(fingerprints, dict) and fingerprints.get(split) == fingerprint
            )
            split_suffix = "" if split == "validation" else f" ({split})"
            if perturbation:
                condition = f"{perturbation}{split_suffix}" if same_data else f"{title}{split_suffix}: {perturbation}"
                yield condition, before, after
            elif not same_data and reported is not None:
                yield f"{title}{split_suffix}", reported, after
