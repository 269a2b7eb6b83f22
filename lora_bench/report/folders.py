"""What run folders hold besides run.json, for the figures: what is missing, damaged or of another shape is left out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_bench import figures
from lora_bench.disk import plain

if TYPE_CHECKING:
    from pathlib import Path

    from lora_bench.figures import Evaluation


def curve(folder: Path, metric: str) -> list[tuple[float, float]]:
    """Step and value of `metric` at each look at the selection split."""
    points = {}
    for line in _lines(folder / "metrics.jsonl"):
        metrics = line.get("metrics")
        step, value = line.get("step"), metrics.get(metric) if isinstance(metrics, dict) else None
        if line.get("split") == "selection" and _number(step) and _number(value):
            points[float(step)] = float(value)  # type: ignore[arg-type]
    return sorted(points.items())


def evaluations(folder: Path) -> dict[str, Evaluation]:
    """The later looks at a run by name, with those of their figures that are numbers."""
    return {
        name: replace(each, metrics={key: float(value) for key, value in each.metrics.items() if _number(value)})
        for name, each in figures.evaluations(folder).items()
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return _parsed(_text(path).splitlines())


def _parsed(texts: list[str]) -> list[dict[str, Any]]:
    found = []
    for text in texts:
        try:
            value = plain(json.loads(text))
        except (ValueError, RecursionError):  # a line that is being written, or damage
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
