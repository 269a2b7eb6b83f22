"""Where the ranks went: heat maps of ranks by layer and module."""

from __future__ import annotations

import re
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_bench.console.format import to_single_line
from lora_bench.report import specs
from lora_bench.report.content import DataTable, Figure, Paragraph

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_bench.report.blocks import Block, Entry
    from lora_bench.report.content import Cell, Content

HEAT_MAPS = 6
"""Settings whose ranks are drawn."""


def allocation(block: Block) -> list[Content]:
    """Return heat maps of ranks by layer and module, for settings whose ranks are not all equal; empty without any."""
    figures: list[Figure] = []
    n_uneven = 0
    ordered = sorted(block.entries, key=lambda entry: (not entry.row.chosen, entry.number))
    for entry in ordered:
        ranks = _mean_ranks(entry.runs)
        if len(set(ranks.values())) > 1 or any(value != round(value) for value in ranks.values()):
            n_uneven += 1
            if n_uneven <= HEAT_MAPS and (figure := _figure(entry, ranks)) is not None:
                figures.append(figure)
    if not figures:
        return []
    note = f"The first {len(figures)} of {n_uneven} settings whose ranks differ between modules."
    return [*([Paragraph(note)] if n_uneven > len(figures) else []), *figures]


def _mean_ranks(runs: Sequence[tuple[Path, dict[str, Any]]]) -> dict[str, float]:
    """Return the mean rank of each adapted linear over the runs."""
    ranks_by_name: dict[str, list[float]] = {}
    for _, record in runs:
        for name, rank in record["targets"].items():
            if isinstance(rank, int | float) and not isinstance(rank, bool):
                ranks_by_name.setdefault(name, []).append(float(rank))
    return {name: fmean(values) for name, values in ranks_by_name.items()}


def _figure(entry: Entry, ranks: dict[str, float]) -> Figure | None:
    """Return the heat map of one entry's ranks; None if no module name has a layer number."""
    cells: dict[tuple[int, str], float] = {}
    for name, rank in ranks.items():
        match = re.search(r"\.(\d+)\.(.+)$", name)
        if match:
            cells[int(match[1]), match[2]] = rank
    if not cells:
        return None
    layers, modules = sorted({layer for layer, _ in cells}), list(dict.fromkeys(module for _, module in cells))
    short = dict(zip(modules, short_names(modules), strict=True))
    highest = max(cells.values()) or 1.0
    values = []
    for (layer, module), rank in cells.items():
        text = f"{rank:.0f}" if rank == round(rank) or rank >= 10 else f"{rank:.1f}"
        tip = f"layer {layer}, {to_single_line(module)}: rank {rank:.4g}"
        values.append({"column": str(layer), "row": short[module], "text": text, "share": rank / highest, "tip": tip})
    where = max(cells, key=lambda cell: cells[cell])
    caption = (
        f"Ranks from {min(cells.values()):.3g} to {highest:.3g}, {fmean(cells.values()):.3g} on average; "
        f"the highest at layer {where[0]}, {where[1]}."
    )
    if len(entry.runs) > 1:
        caption += f" Mean of {len(entry.runs)} runs."
    rows: list[list[Cell]] = [
        [module, *(f"{cells[layer, module]:.4g}" if (layer, module) in cells else "" for layer in layers)]
        for module in modules
    ]
    numbers = DataTable(f"Ranks of {entry.name}", ["module", *(f"layer {layer}" for layer in layers)], rows)
    spec = specs.heat_map(values, [str(layer) for layer in layers], list(short.values()), ("layer", None))
    return Figure(entry.name, caption, spec, numbers, "wide")


def short_names(modules: Sequence[str]) -> list[str]:
    """Return each name's last word, with as many words before it as make it unique."""
    names = []
    for module in modules:
        words = module.split(".")
        for n in range(1, len(words) + 1):
            name = ".".join(words[-n:])
            if sum(other == name or other.endswith(f".{name}") for other in modules) == 1:
                break
        names.append(to_single_line(name))
    return names
