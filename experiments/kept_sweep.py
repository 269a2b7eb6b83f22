"""Sweeps that are resumed where they were stopped, and tuned ones whose reported runs are kept as records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keep_records import keep

from lora_bench.cli import main as lora_bench
from lora_bench.records import run_folder, sweep_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def start_or_resume(command: Sequence[str], folder: Path) -> int:
    """Start a sweep in a folder, or resume the one that is there; return the exit code.

    Args:
        command: that starts it, without the folder.
        folder: of the sweep.
    """
    if sweep_folder.is_sweep(folder):
        return lora_bench(["train", "-m", f"resume={folder}"])
    return lora_bench([*command, f"hydra.sweep.dir={folder}"])


def is_kept(records: Path, runs: int) -> bool:
    """Return whether a folder of records has so many runs, all done."""
    records_by_folder = run_folder.find_runs([records])[0] if records.is_dir() else []
    return len([record for _, record in records_by_folder if record["status"] == "done"]) >= runs


def run_kept(arguments: Sequence[str], folder: Path, records: Path, runs: int) -> int:
    """Start or resume a tuned sweep, keep the records of its reported runs, and return the exit code.

    Args:
        arguments: of `lora-bench train -m`; a sweep that is resumed has its own.
        folder: of the sweep.
        records: where its records are kept; if all are there, nothing is run.
        runs: the number of reported runs.
    """
    if is_kept(records, runs):
        return 0
    code = start_or_resume(["train", "-m", *arguments], folder)
    if code == 0:
        keep(folder / "report", records)
    return code
