"""Files of run folders that charts read besides run.json. A missing or damaged file, or entry, is left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_bench.records import evaluations

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.records.evaluations import Evaluation


def evaluations_by_name(folder: Path) -> dict[str, Evaluation]:
    """Return the later evaluations of a run (`lora-bench eval`) by name."""
    return {
        name: replace(evaluation, metrics={key: float(value) for key, value in evaluation.metrics.items()})
        for name, evaluation in evaluations.read_evaluations(folder).items()
    }
