"""What run folders hold besides run.json, for the figures: what is missing, damaged or of another shape is left out."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_bench.files import untrusted
from lora_bench.files.untrusted import as_number
from lora_bench.records import evaluations

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.records.evaluations import Evaluation


def curve(folder: Path, metric: str) -> list[tuple[float, float]]:
    """Step and value of `metric` at each look at the selection split."""
    points = {}
    with suppress(OSError, ValueError):
        for line in untrusted.read_json_lines(folder / "metrics.jsonl"):
            metrics = line.get("metrics")
            step = as_number(line.get("step"))
            value = as_number(metrics.get(metric)) if isinstance(metrics, dict) else None
            if line.get("split") == "selection" and step is not None and value is not None:
                points[float(step)] = float(value)
    return sorted(points.items())


def evaluations_by_name(folder: Path) -> dict[str, Evaluation]:
    """The later looks at a run by name."""
    return {
        name: replace(each, metrics={key: float(value) for key, value in each.metrics.items()})
        for name, each in evaluations.read_evaluations(folder).items()
    }
