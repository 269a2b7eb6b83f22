"""What run folders hold besides run.json, for the figures: what is missing, damaged or of another shape is left out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_bench.disk import plain

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """Of one split, in the order of its rows: (N,) each; only rows with a label."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each label was predicted; 1 is predicted from a score of 0.5 on."""
        right: NDArray[np.bool_] = np.equal(self.scores >= 0.5, self.labels == 1)
        return right


def curve(folder: Path, metric: str) -> list[tuple[float, float]]:
    """Step and value of `metric` at each look at the selection split."""
    points = {}
    for line in _lines(folder / "metrics.jsonl"):
        metrics = line.get("metrics")
        step, value = line.get("step"), metrics.get(metric) if isinstance(metrics, dict) else None
        if line.get("split") == "selection" and _number(step) and _number(value):
            points[float(step)] = float(value)  # type: ignore[arg-type]
    return sorted(points.items())


def predictions(folder: Path, split: str) -> Predictions | None:
    """The predictions of a reported split; None where there are none that can be used."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(folder / "predictions" / f"{split}.parquet", columns=["id", "label", "score"]).drop_null()
        ids, labels, scores = (found[name].to_numpy() for name in ("id", "label", "score"))
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    usable = len(ids) and np.issubdtype(ids.dtype, np.integer) and np.issubdtype(scores.dtype, np.floating)
    if not usable or not np.isin(labels, (0, 1)).all() or not ((scores >= 0) & (scores <= 1)).all():
        return None
    order = np.argsort(ids, kind="stable")
    return Predictions(ids[order], labels[order].astype(np.int64), scores[order].astype(np.float64))


def evaluations(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of each later evaluation of a run, by its name."""
    found = {}
    for path in sorted((folder / "evaluations").glob("*.json")):
        content = next(iter(_parsed([_text(path)])), None)
        metrics = content.get("metrics") if content else None
        if isinstance(metrics, dict):
            found[path.stem] = {name: float(value) for name, value in metrics.items() if _number(value)}
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
