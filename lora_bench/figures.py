"""Which of a run's many figures have columns of their own in tables, its later evaluations among them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lora_bench.disk import plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BESIDES = {
    "unseen/f1": "↑",
    "unseen/mcc": "↑",
    "perturbed/f1": "↑",
    "perturbed/f1_drop": "↓",
    "perturbed/flip_rate": "↓",
    "perturbed/attack_success": "↓",
    "perturbed/order_consistency": "↑",
}
"""Of a split's figures besides its own, those that have columns, and which direction is better."""


def has_column(name: str) -> bool:
    """Whether a figure of a split, without the split's name, is shown in tables."""
    return "/" not in name or name in BESIDES


def with_evaluations(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the figures of `lora-bench eval` among its metrics.

    Those of a split that the run itself reports stand below the split's name, where they are new; those of other data
    below `<evaluation>:<split>`.
    """
    metrics: dict[str, Any] = dict(record["metrics"])
    own = _fingerprints(record)
    for path in sorted((folder / "evaluations").glob("*.json")):
        content = None
        with suppress(OSError, ValueError, RecursionError):
            content = plain(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
            continue
        theirs = _fingerprints(content)
        for key, value in content["metrics"].items():
            split, _, name = key.partition("/")
            if split in theirs and theirs[split] == own.get(split):
                metrics.setdefault(key, value)
            else:
                metrics[f"{path.stem}:{split}/{name}"] = value
    return {**record, "metrics": metrics}


def _fingerprints(content: Mapping[str, Any]) -> dict[str, Any]:
    data = content.get("data")
    found = data.get("fingerprint") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}
