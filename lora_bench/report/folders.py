"""What run folders hold besides run.json, for the figures: what is missing, damaged or of another shape is left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_bench.records import evaluations

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.records.evaluations import Evaluation


def evaluations_by_name(folder: Path) -> dict[str, Evaluation]:
    """The later looks at a run by name."""
    return {
        name: replace(each, metrics={key: float(value) for key, value in each.metrics.items()})
        for name, each in evaluations.read_evaluations(folder).items()
    }
