"""What the tables of several experiments share: the name of a run's method, and the cells of a tested difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pandas import isna

from lora_bench.records import run_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Any

    from pandas import Series


def method_overrides(overrides: Iterable[str]) -> str:
    """Return the overrides that name the method of a run or job, in their order: `experiment=recipe adapter=lora`."""
    return " ".join(text for text in overrides if text.startswith(("experiment=", "adapter=")))


def runs_of(method: str, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return folder and record of each run of a method below a folder; none if there is no such folder.

    Args:
        method: its overrides, in any order; empty: of every method.
        folder: of runs or kept records.
    """
    found = run_folder.find_runs([folder])[0] if folder.is_dir() else []
    names = set(method.split())
    return [run for run in found if not names or set(method_overrides(run[1]["overrides"]).split()) == names]


def difference_cells(row: Series | Mapping[str, Any], *, points: bool = False) -> list[str]:
    """Return two cells of a row of `lora_bench.api.compare`: the difference with its interval, and the adjusted p.

    Args:
        row: the row, or a mapping with its columns.
        points: the difference and interval are given in points, as 100 times what they are.
    """
    if isna(row["tests.p_holm"]):  # not tested, or without a verdict; a number if any row of the data has one
        return ["not tested", ""]
    difference, low, high = (
        f"{100 * row[key]:+.1f}" if points else f"{row[key]:+.3f}"
        for key in ("tests.difference", "tests.difference_low", "tests.difference_high")
    )
    p = f"{row['tests.p_holm']:.3f}" if row["tests.p_holm"] >= 0.001 else "< 0.001"
    return [f"{difference} ({low} to {high})", p]
