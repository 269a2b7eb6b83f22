from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.records.run_folder import Run
from tests.report.runs import HOSTILE, make

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("runs")
    grid = [(adapter, rank, seed) for adapter in ("lora", "dora") for rank in (2, 8) for seed in (0, 1)]
    for n, (adapter, rank, seed) in enumerate(grid):
        ahead = adapter == "dora"
        make(
            top / str(n), adapter, seed, 0.5 + 0.1 * ahead + 0.01 * rank + 0.02 * seed * (1 + ahead), rank, 1e-3 * rank
        )
    choices = {"model": "bert", "adapter": HOSTILE, "data": "qqp"}
    Run.claim(top / "bad", choices=choices, config={"seed": 0}, overrides=[HOSTILE]).finish("failed", HOSTILE)
    return top
