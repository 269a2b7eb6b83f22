"""What run folders hold besides run.json, for the figures: what is missing, damaged or of another shape is left out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.disk import plain

if TYPE_CHECKING:
    from pathlib import Path


def curve(folder: Path, metric: str) -> list[tuple[float, float]]:
    """Step and value of `metric` at each look at the selection split."""
    points = {}
    for line in _lines(folder / "metrics.jsonl"):
        metrics = line.get("metrics")
        step, value = line.get("step"), metrics.get(metric) if isinstance(metrics, dict) else None
        if line.get("split") == "selection" and _number(step) and _number(value):
            points[float(step)] = float(value)  # type: ignore[arg-type]
    return sorted(points.items())


@dataclass(frozen=True)
class Evaluation:
    """A later look at a finished run (`lora-bench eval`)."""

    metrics: dict[str, float]
    fingerprints: dict[str, str]
    """Of each split of its data."""


def evaluations(folder: Path) -> dict[str, Evaluation]:
    """By name."""
    found = {}
    for path in sorted((folder / "evaluations").glob("*.json")):
        content = next(iter(_parsed([_text(path)])), {})
        metrics, data = content.get("metrics"), content.get("data")
        fingerprints = data.get("fingerprint") if isinstance(data, dict) else None
        if isinstance(metrics, dict):
            numbers = {name: float(value) for name, value in metrics.items() if _number(value)}
            found[path.stem] = Evaluation(numbers, fingerprints if isinstance(fingerprints, dict) else {})
    return found


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
