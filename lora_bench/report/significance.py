"""The tests in detail: what each p value takes for granted, effect sizes and power."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.report.content import DataTable, Paragraph, Verdict, format_p_cell, signed

if TYPE_CHECKING:
    from lora_bench.report.blocks import Block
    from lora_bench.report.content import Cell, Content

LISTED = 100
"""Rivals that are listed."""


def tests(block: Block) -> list[Content]:
    """Return the tables of the tests of one data set; empty if nothing was tested."""
    rivals = [(e, e.row.finding) for e in block.rows if e.row.finding is not None and not e.is_baseline][:LISTED]
    if block.baseline is None or not rivals:
        return []
    has_notes = any(finding.why for _, finding in rivals)
    rows: list[list[Cell]] = []
    other_rows: list[list[Cell]] = []
    for entry, finding in rivals:
        power = "" if finding.power is None else f"{finding.power:.0%}"
        detectable = "" if finding.detectable is None else f"{finding.detectable:.4f}"
        cells: list[Cell] = [entry.name, Verdict(finding.verdict), format_p_cell(finding.p_holm)]
        cells += [format_p_cell(finding.p_margin), signed(finding.effect_size, 2), power, detectable]
        rows.append([*cells, *([finding.why or ""] if has_notes else [])])
        if finding.difference is not None:
            by_seed = [" ".join(map(format_p_cell, p or [])) for p in (finding.p_bootstrap, finding.p_mcnemar)]
            other_rows.append([entry.name, format_p_cell(finding.p), format_p_cell(finding.p_seeds), *by_seed])
    header = ["setting", "verdict", "p (Holm)", "p of a difference beyond the margin", "effect size"]
    header += ["power for the margin", "detected with 80 %", *(["note"] if has_notes else [])]
    caption = f"Tests against {block.baseline.name}; seeds and examples both count as chance"
    contents: list[Content] = [DataTable(caption, header, rows)]
    if other_rows:
        titles = ["setting", "p, not adjusted", "t test over seeds", "bootstrap, by seed", "McNemar mid-p, by seed"]
        rest = "the last two the models"
        if all(finding.p_mcnemar is None for _, finding in rivals):  # a regression
            titles, other_rows, rest = titles[:-1], [row[:-1] for row in other_rows], "the bootstrap the models"
        note = f"The usual tests answer other questions: the t test takes the examples as fixed, {rest}."
        contents += [Paragraph(note), DataTable("Other p values", titles, other_rows)]
    return contents
