"""Rows are named by what tells them apart, and by no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.summary import summarise
from lora_bench.report.blocks import group_blocks
from tests.report.runs import make

if TYPE_CHECKING:
    from pathlib import Path


def test_a_methods_only_row_needs_no_settings_and_others_those_in_which_they_differ(tmp_path: Path) -> None:
    rows = {"full": [(8, 1e-4)], "lora": [(2, 1e-3), (8, 1e-3)], "dora": [(8, 1e-3), (8, 2e-3)]}
    settings_by_run = [
        (adapter, *settings) for adapter, settings_of_method in rows.items() for settings in settings_of_method
    ]
    for number, (adapter, rank, lr) in enumerate(settings_by_run):
        make(tmp_path / str(number), adapter, 0, 0.5, rank, lr)
    (block,) = group_blocks(summarise([tmp_path]))
    assert {entry.name for entry in block.entries} == {
        "full",
        "lora rank=2",
        "lora rank=8",
        "dora lr=0.001",
        "dora lr=0.002",
    }
    assert {entry.method for entry in block.entries} == {"full", "lora", "dora"}


def test_names_are_unique_where_keys_end_alike_or_a_name_repeats(tmp_path: Path) -> None:
    long = "x" * 40
    for number, (adapter, lr) in enumerate(((f"{long}a", 1e-3), (f"{long}b", 1e-3), (f"{long}a", 1e-2))):
        make(tmp_path / str(number), adapter, 0, 0.5, 8, lr)
    (block,) = group_blocks(summarise([tmp_path]))
    names = [entry.name for entry in block.entries]
    assert len(set(names)) == len(names) == 3


def test_of_several_methods_the_chosen_settings_have_colours(runs: Path) -> None:
    table = summarise([runs])
    (block,) = group_blocks(table)
    assert [entry.row for entry in block.rows] == table.rows
    assert len(block.entries) == len(table.settings) == 4
    assert {entry.name for entry in block.chosen} == {entry.name for entry in block.rows}
    assert {block.series_name(entry) for entry in block.entries} == {"dora", "lora"}
