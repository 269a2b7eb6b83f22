"""Rank by learning rate: the score on the selection split, which chooses a method's setting."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lora_bench.config.metric_names import display_name
from lora_bench.report import specs
from lora_bench.report.content import DataTable, Figure, Grid, Paragraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

MAPS = 12
"""Methods that have a heat map."""
SIDE = 10
"""Ranks and learning rates of a heat map."""
NONE = "none"
"""The rank of a method without one."""


def heat_maps(block: Block) -> list[Content]:
    """Return a heat map for each method with several ranks or learning rates; empty if there is none."""
    by_method: dict[str, list[Entry]] = {}
    for entry in block.entries:
        if math.isfinite(entry.selection_score):
            by_method.setdefault(entry.method, []).append(entry)
    metric = display_name(block.main_metric)
    figures = [figure for name, entries in by_method.items() if (figure := _figure(name, entries, metric)) is not None]
    if not figures:
        return []
    note = (
        f"Mean {metric} on the selection split, over seeds. The setting of each method is chosen here; "
        "the reported split has no part in it."
    )
    if len(figures) > MAPS:
        note += f" The first {MAPS} of {len(figures)} methods are drawn."
    return [Paragraph(note), Grid(figures[:MAPS])]


def _figure(method: str, entries: Sequence[Entry], metric: str) -> Figure | None:
    """Return the heat map of one method; None if it has a single rank and learning rate.

    Args:
        method: its name.
        entries: its settings.
        metric: the name of the main metric.
    """
    cells: dict[tuple[float | None, float | None], list[Entry]] = {}
    for entry in entries:
        cells.setdefault((_number(entry, "adapter", "rank"), _number(entry, "optimizer", "lr")), []).append(entry)
    if len(cells) < 2:
        return None
    best = {cell: max(group, key=lambda e: (e.row.chosen, e.selection_score)) for cell, group in cells.items()}
    n_cells = len(best)
    best = _readable(best)
    scores = [entry.selection_score for entry in best.values()]
    low, high = min(scores), max(scores)
    ranks, rates = (sorted({cell[i] for cell in best}, key=lambda value: value or 0.0) for i in (0, 1))
    values: list[dict[str, Any]] = []
    chosen = ""
    for (rank, rate), entry in best.items():
        where = f"rank {_text(rank)}, learning rate {_text(rate)}"
        chosen = f"chosen: {where}" if entry.row.chosen else chosen
        value: dict[str, Any] = {"row": _text(rank), "column": _text(rate), "text": f"{entry.selection_score:.3f}"}
        value |= {"share": (entry.selection_score - low) / (high - low) if high > low else 0.5}
        value |= {
            "chosen": entry.row.chosen,
            "tip": f"{where}\nselection {metric} {entry.selection_score:.4f}, n={entry.row.n}",
        }
        values.append(value)
    names = [_text(rate) for rate in rates]
    spec = specs.heat_map(values, names, [_text(rank) for rank in reversed(ranks)], ("learning rate", "rank"))
    rows: list[list[Cell]] = [
        [_text(rank), *(best[rank, rate].selection_score if (rank, rate) in best else "" for rate in rates)]
        for rank in ranks
    ]
    numbers = DataTable(f"Selection {metric} of {method} by rank and learning rate", ["rank", *names], rows)
    caption = chosen or "none is chosen: seeds are missing"
    if any(len(group) > 1 for group in cells.values()):
        caption += "; of settings that differ in other keys, the chosen or best one"
    if len(best) < n_cells:
        caption += f"; {len(best)} of {n_cells} cells, those of the ranks and learning rates with the best scores"
    return Figure(method, caption, spec, numbers)


Cells = dict[tuple[float | None, float | None], "Entry"]
"""Setting by rank and learning rate."""


def _readable(cells: Cells) -> Cells:
    """Return the cells of the `SIDE` ranks and learning rates with the best settings; the chosen one is kept."""
    for i in (0, 1):
        ordered = sorted(cells.items(), key=lambda item: (not item[1].row.chosen, -item[1].selection_score))
        kept = list(dict.fromkeys(cell[i] for cell, _ in ordered))[:SIDE]
        cells = {cell: entry for cell, entry in cells.items() if cell[i] in kept}
    return cells


def _number(entry: Entry, group: str, key: str) -> float | None:
    """Return a number of a setting's configuration; None if it has none."""
    content = entry.runs[0][1]["config"].get(group)
    value = content.get(key) if isinstance(content, dict) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _text(value: float | None) -> str:
    """Return a rank or learning rate without exponent."""
    if value is None:
        return NONE
    return f"{value:.10f}".rstrip("0").rstrip(".") if abs(value) >= 1e-9 else f"{value:g}"
