"""Which of a run's many figures have columns of their own in tables, its later evaluations among them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.disk import plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAMES = {"mcc": "MCC", "f1": "F1"}
"""Metrics that are written otherwise where people read."""
BESIDES = {
    "unseen/f1": "↑",
    "unseen/mcc": "↑",
    "perturbed/f1": "↑",
    "perturbed/f1_drop": "↓",
    "perturbed/flip_rate": "↓",
    "perturbed/attack_success": "↓",
    "perturbed/order_consistency": "↑",
    "members/mcc": "↑",
}
"""Of a split's figures besides its own, those that have columns, and which direction is better."""


def has_column(name: str) -> bool:
    """Whether a figure of a split, without the split's name, is shown in tables."""
    return "/" not in name or name in BESIDES


@dataclass(frozen=True)
class Evaluation:
    """A later look at a finished run (`lora-bench eval`), as it was written."""

    metrics: dict[str, Any]
    fingerprints: dict[str, Any]
    """Of each split of its data."""


def evaluations(folder: Path) -> dict[str, Evaluation]:
    """Those of a run by name; what is damaged or of another shape is left out."""
    found = {}
    for path in sorted((folder / "evaluations").glob("*.json")):
        content = None
        with suppress(OSError, ValueError, RecursionError):
            content = plain(json.loads(path.read_text(encoding="utf-8")))
        if isinstance(content, dict) and isinstance(content.get("metrics"), dict):
            found[path.stem] = Evaluation(content["metrics"], _fingerprints(content))
    return found


def with_evaluations(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the figures of `lora-bench eval` among its metrics.

    Those of a split that the run itself reports stand below the split's name, where they are new; those of other data
    below `<evaluation>:<split>`.
    """
    metrics: dict[str, Any] = dict(record["metrics"])
    own = _fingerprints(record)
    for title, evaluation in evaluations(folder).items():
        theirs = evaluation.fingerprints
        for key, value in evaluation.metrics.items():
            split, _, name = key.partition("/")
            if split in theirs and theirs[split] == own.get(split):
                metrics.setdefault(key, value)
            else:
                metrics[f"{title}:{split}/{name}"] = value
    return {**record, "metrics": metrics}


def _fingerprints(content: Mapping[str, Any]) -> dict[str, Any]:
    data = content.get("data")
    found = data.get("fingerprint") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}
