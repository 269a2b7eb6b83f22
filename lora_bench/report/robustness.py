"""How far scores fall where the texts are perturbed, or on other data."""

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
LANES = 16
"""Places that are drawn: those where the drawn experiments fall farthest."""


def robustness(block: Block) -> Markup | None:
    """The main metric in each place besides the reported split, and how far it is from that of the same runs."""
    metric = block.main.name.rsplit("/", 1)[-1]
    found: Found = [(entry, place, pairs) for entry in block.entries for place, pairs in _places(entry, metric).items()]
    if not found:
        return None
    rows: list[list[Content]] = []
    for entry, place, pairs in found[:TABLE_ROWS]:
        before, after = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
        change = f"{after - before:+.4f}".replace("-", "−")
        rows.append([entry.name, place, len(pairs), before, after, change])
    title = f"Change of {column_name(block.main)} where the texts are perturbed or the data is another"
    left_out = f" The first {TABLE_ROWS} of {len(found)} rows are shown." if len(found) > TABLE_ROWS else ""
    names = ["experiment", "place", "runs", "reported split", "there", "change"]
    numbers = join([element("p", left_out, class_="note") if left_out else "", table(title, names, rows)])
    drawn = _drawn(block, found)
    if not drawn:
        return numbers
    places = sorted(drawn, key=lambda place: fmean(mark.value for mark in drawn[place]))
    said = f"{block.chosen_how} Left of 0: worse than the same runs on the reported split as it is.".strip()
    if len(places) > LANES:
        said += f" The {LANES} of {len(places)} places with the largest falls are drawn."
    made = [Lane(place, drawn[place]) for place in places[:LANES]]
    x = axes.linear([0.0, *(mark.value for lane in made for mark in lane.marks)], "points →")
    chart = draw_lanes(x, made, f"{title}. {said}")
    rows_drawn = {mark.row for lane in made for mark in lane.marks}
    key = legend([(entry.series, entry.name) for entry in block.chosen if entry.number in rows_drawn])
    return join([key, figure(chart, said, numbers, title=title, class_="wide")])


Found: TypeAlias = "list[tuple[Entry, str, list[tuple[float, float]]]]"
"""Experiment, place, and of each of its runs that was scored there the metric before and there."""


def _drawn(block: Block, found: Found) -> dict[str, list[Mark]]:
    """The chosen experiments' changes in points, by place."""
    chosen = {entry.number for entry in block.chosen}
    marks: dict[str, list[Mark]] = {}
    for entry, place, pairs in found:
        if entry.number in chosen:
            change = 100 * fmean(after - before for before, after in pairs)
            mark = Mark(change, entry.series, f"{entry.name}, {place}: {change:+.1f}", entry.number)
            marks.setdefault(place, []).append(mark)
    return marks


def _places(entry: Entry, metric: str) -> dict[str, list[tuple[float, float]]]:
    """By place, of each run that was scored there: the metric on the split as it is, and there."""
    found: dict[str, list[tuple[float, float]]] = {}
    for folder, record in entry.runs:
        for place, before, after in _of_run(record, folders.evaluations_by_name(folder), metric):
            found.setdefault(place, []).append((before, after))
    return found


def _of_run(
    record: Mapping[str, Any], evaluations: Mapping[str, Evaluation], metric: str
) -> Iterator[tuple[str, float, float]]:
    """What is perturbed is compared with the same data as it is; other data with the reported split."""
    own, fingerprints = record["metrics"], record["data"].get("fingerprint")
    values = (own.get(f"{split}/{metric}") for split in ("validation", "test", "selection"))
    reported = next((value for value in values if isinstance(value, float)), None)
    for name, evaluation in evaluations.items():
        for key, after in evaluation.metrics.items():
            split, _, rest = key.partition("/")
            place, _, tail = rest.rpartition("/")
            before = evaluation.metrics.get(f"{split}/{metric}")
            if tail != metric or before is None:
                continue
            found = evaluation.fingerprints.get(split)
            same = found is not None and isinstance(fingerprints, dict) and fingerprints.get(split) == found
            where = "" if split == "validation" else f" ({split})"
            if place:
                yield f"{place}{where}" if same else f"{name}{where}: {place}", before, after
            elif not same and reported is not None:
                yield f"{name}{where}", reported, after
