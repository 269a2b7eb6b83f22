"""Conditions of `compare --where`: which runs meet them, and which expressions are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_bench.analysis.summary import summarise
from lora_bench.analysis.where import parse
from lora_bench.compare import main
from lora_bench.errors import Code
from tests.command_line import refuses
from tests.test_compare import make, values

if TYPE_CHECKING:
    from pathlib import Path

RUNS = [
    {"adapter": "lora", "adapter.rank": 8, "optimizer.lr": 1e-3, "adapter.magnitude": False, "adapter.layers": [4, 5]},
    {"adapter": "lora", "adapter.rank": 16.0, "optimizer.lr": 2e-3, "adapter.magnitude": True, "adapter.layers": "all"},
    {"adapter": "full", "optimizer.lr": 5e-5, "model.path": "my models/a and b"},
]
KEYS = sorted({key for run in RUNS for key in run})


@pytest.mark.parametrize(
    ("expression", "matching"),
    [
        ("adapter=lora", [0, 1]),
        ("adapter == lora and adapter.rank<=8", [0]),
        ("adapter.rank=16", [1]),
        ("adapter.rank!=8", [1, 2]),
        ("adapter.rank>8 or adapter=full", [1, 2]),
        ("adapter=full or adapter=lora and adapter.rank>8", [1, 2]),
        ("(adapter=full or adapter=lora) and adapter.rank>8", [1]),
        ("not adapter=lora", [2]),
        ("not (adapter.rank=8 or adapter=full)", [1]),
        ("optimizer.lr<0.002", [0, 2]),
        ("optimizer.lr=1e-3", [0]),
        ("adapter.magnitude=true", [1]),
        ("adapter.layers=[4,5]", [0]),
        ("adapter>5", []),
        ("model.path='my models/a and b'", [2]),
        ('model.path="my models/a and b" or adapter.rank>=16', [1, 2]),
    ],
)
def test_a_run_meets_the_conditions_by_number_or_text(expression: str, matching: list[int]) -> None:
    condition = parse(expression, KEYS, KEYS)
    assert [i for i, run in enumerate(RUNS) if condition(run)] == matching


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "adapter",
        "adapter=",
        "=lora",
        "adapter=lora and",
        "adapter=lora adapter.rank=8",
        "(adapter=lora",
        "adapter=lora)",
        "adapter=='lora",
        "adapter<>lora",
        "adapter=(lora)",
        "not",
        "(" * 3000 + "adapter=lora" + ")" * 3000,
        "not " * 3000 + "adapter=lora",
        "adapter=\x00' or",
    ],
)
def test_a_malformed_expression_is_refused(expression: str) -> None:
    with refuses(Code.INVALID_SYNTAX, key="--where"):
        parse(expression, KEYS, KEYS)


def test_an_unknown_key_is_refused_with_the_nearest_and_a_result_with_the_reason() -> None:
    with refuses(Code.UNKNOWN_KEY, key="--where") as unknown:
        parse("adapter.rnk=8", KEYS, KEYS)
    assert "adapter.rank" in str(unknown.value)
    for result in ("mcc", "validation/mcc", "cost.train_flops", "params.adapter"):
        with refuses(Code.UNSUPPORTED, key="--where"):
            parse(f"adapter=lora and {result}>0.5", KEYS, KEYS)


def test_compare_reads_only_the_runs_that_meet_them(tmp_path: Path) -> None:
    for rank in (2, 8, 16):
        for adapter in ("lora", "dora"):
            config = {"adapter.rank": rank}
            make(tmp_path / f"{adapter}{rank}", rank / 100, choices={"adapter": adapter}, config=config)
    make(tmp_path / "failed", choices={"adapter": "dora"}, config={"adapter.rank": 4}, status="failed")
    table = summarise([tmp_path], where="adapter=dora and adapter.rank<16")
    assert values(table) == [(8,), (2,)]
    assert [missing.folder.name for missing in table.missing] == ["failed"]
    with refuses(Code.NOT_FOUND, key="--where"):
        main([str(tmp_path), "--where", "adapter.rank>99"])
