"""Rows are named by what tells them apart, and by no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.analysis.summary import summarise
from lora_bench.report.series import group_blocks
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
