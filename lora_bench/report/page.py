"""The page: its sections in order. What to use comes first, the details are folded; sections without data are left out.

Headline, advice, chart and table of a data set all come from its decision and from the rows that `compare` prints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.significance import MARGIN
from lora_bench.report import (
    allocation,
    appendix,
    calibration,
    confusions,
    curves,
    disagreements,
    heat_map,
    methods,
    robustness,
    scatter,
    settings,
    significance,
    tradeoffs,
)
from lora_bench.report.blocks import group_blocks
from lora_bench.report.content import Heading, Section
from lora_bench.report.document import render

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.analysis.table import Table
    from lora_bench.report.blocks import Block
    from lora_bench.report.content import Content

DATA_SETS = 4
"""Data sets that have charts; the others have their advice and their table."""


def page(table: Table, margin: float = MARGIN, refresh: int | None = None) -> str:
    """Return the table as one HTML page that needs no other file; its numbers are those of the other formats.

    Args:
        table: as `summarise` returns it.
        margin: the largest difference that counts as equivalent.
        refresh: seconds after which the page loads itself again, while runs finish; None: it does not.
    """
    blocks = group_blocks(table)
    headlines = [block.decision.headline if block.decision else block.name for block in blocks]
    title = headlines[0] if headlines else "No finished run yet"
    if len(blocks) > 1:
        title = f"Results on {len(blocks)} data sets"
    top = [
        Section(f"result-{i}", headline if len(blocks) > 1 else "", methods.contents(table, block, margin))
        for i, (block, headline) in enumerate(zip(blocks, headlines, strict=True))
    ]
    return render(title, appendix.description(table), top, _details(table, blocks), refresh)


def _details(table: Table, blocks: list[Block]) -> list[Section]:
    """Return the folded sections that have contents."""

    def per_block(make: Callable[[Block], list[Content]]) -> list[Content]:
        contents: list[Content] = []
        for block in blocks[:DATA_SETS]:
            of_block = make(block)
            contents += [Heading(block.name)] if of_block and block.name else []
            contents += of_block
        return contents

    number = {id(block): i for i, block in enumerate(blocks)}
    sections = [
        Section("settings", "All settings", settings.settings(table, blocks), "sort, filter, tick and compare"),
        Section("grid", "Rank and learning rate", per_block(heat_map.heat_maps), "scores on the selection split"),
        Section(
            "cost",
            "Quality against cost",
            per_block(lambda block: tradeoffs.costs(table, block, number[id(block)])),
            "axes to choose, Pareto front",
        ),
        Section("curves", "Learning curves", per_block(curves.curves), "by step and by FLOPs"),
        Section("tests", "Tests in detail", per_block(significance.tests), "p values, effect sizes, power"),
        Section("calibration", "Calibration", per_block(calibration.calibration), "are probabilities right"),
        Section("scatter", "Predictions and labels", per_block(scatter.scatter), "of regression tasks"),
        Section("confusions", "Confusions", per_block(confusions.confusions), "of classes, and F1 of each class"),
        Section("allocation", "Where the ranks went", per_block(allocation.allocation), "by layer and module"),
        Section("robustness", "Robustness", per_block(robustness.robustness), "perturbed texts and other data"),
        Section("disagreements", "Disagreements", per_block(disagreements.disagreements), "examples of two runs"),
        Section(
            "savings",
            "Saved against full fine-tuning",
            appendix.side_table(table.savings, "Shares of its FLOPs, by cause"),
            "FLOPs and time, by cause",
        ),
        Section("published", "Published results", appendix.side_table(table.published, "Of GLUE's QQP dev set")),
        Section("configuration", "Configuration", appendix.differences(table), "how runs differ"),
        Section("environment", "Environment", appendix.environment(table), "commit, device, versions, data"),
        Section("missing", "Caveats and missing runs", appendix.missing(table), appendix.status_counts(table)),
        Section("folders", "Folders", appendix.folders(blocks), "of the runs"),
    ]
    return [section for section in sections if section.contents]
