"""The comparison in words: numbers of the sentence about cost."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from lora_bench.analysis.summary import summarise
from lora_bench.records.run_folder import Run
from lora_bench.report import page
from tests.report.runs import make

if TYPE_CHECKING:
    from pathlib import Path


def lead(top: Path) -> str:
    """Return the text of the summary's first paragraph."""
    match = re.search(r'<p class="lead">(.*?)</p>', page(summarise([top])), re.DOTALL)
    assert match
    return re.sub("<[^>]*>", "", match[1])


def make_with_cost(folder: Path, adapter: str, mcc: float, parameters: int) -> None:
    make(folder, adapter, 0, mcc)
    run = Run(folder, json.loads((folder / "run.json").read_text()))
    run.update(params={"adapter": parameters}, cost={"train_seconds": None})


def test_a_cheaper_experiment_is_behind_by_the_difference_of_the_means(tmp_path: Path) -> None:
    make_with_cost(tmp_path / "a", "lora", 0.50, 3000)
    make_with_cost(tmp_path / "b", "dora", 0.62, 5000)
    make_with_cost(tmp_path / "c", "vera", 0.44, 2000)
    assert "5.0 k adapter parameters, against 2.0 k for vera, which is 18.0 points behind" in lead(tmp_path)


def test_the_cheapest_leader_is_compared_with_nobody(tmp_path: Path) -> None:
    make_with_cost(tmp_path / "a", "lora", 0.50, 3000)
    make_with_cost(tmp_path / "b", "dora", 0.62, 1000)
    assert "1.0 k adapter parameters, the least of all" in lead(tmp_path)
    assert "behind" not in lead(tmp_path)
