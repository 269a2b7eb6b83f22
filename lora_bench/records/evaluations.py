"""Which of a run's many figures have columns of their own in tables, its later evaluations among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.files import untrusted
from lora_bench.files.atomic_io import describe_error, to_json
from lora_bench.files.untrusted import as_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

LEFT_OUT = "left_out"
"""Beside a record's own keys: which files of the run's folder cannot be read, and why."""


LISTED = 5
"""Of them, those that are named."""


@dataclass(frozen=True)
class Evaluation:
    """A later look at a finished run (`lora-bench eval`), as it was written."""

    metrics: dict[str, Any]
    fingerprints: dict[str, Any]
    """Of each split of its data."""


def evaluations(folder: Path) -> dict[str, Evaluation]:
    """Return those of a run by name; what is damaged or of another shape is left out."""
    return _evaluations(folder)[0]


def _evaluations(folder: Path) -> tuple[dict[str, Evaluation], list[str]]:
    """Return those of a run by name, and which file is left out, with the reason."""
    found, left_out = {}, []
    for path in sorted((folder / "evaluations").glob("*.json")):
        try:
            content = to_json(untrusted.read_json(path))
            if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
                raise ValueError("it holds no metrics")
        except (OSError, ValueError) as error:
            left_out.append(f"{path}: {describe_error(error)}")
            continue
        metrics = {key: number for key, value in content["metrics"].items() if (number := as_number(value)) is not None}
        found[path.stem] = Evaluation(metrics, _fingerprints(content))
    return found, left_out


def with_evaluations(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with the figures of `lora-bench eval` among its metrics, and with what is left out in `left_out`.

    Those of a split that the run itself reports stand below the split's name, where they are new; those of other data
    below `<evaluation>:<split>`.
    """
    metrics: dict[str, Any] = dict(record["metrics"])
    own = _fingerprints(record)
    later, left_out = _evaluations(folder)
    for title, evaluation in later.items():
        theirs = evaluation.fingerprints
        for key, value in evaluation.metrics.items():
            split, _, name = key.partition("/")
            if split in theirs and theirs[split] == own.get(split):
                metrics.setdefault(key, value)
            else:
                metrics[f"{title}:{split}/{name}"] = value
    if reason := untrusted.refusal(folder / "metrics.jsonl"):
        left_out.append(f"{folder / 'metrics.jsonl'}: {reason}")
    return {**record, "metrics": metrics, LEFT_OUT: left_out}


def left_out_notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each file of these runs that is not read and why; of many the first few."""
    lines = [line for record in records for line in record[LEFT_OUT]]
    more = [f"{len(lines) - LISTED} more files cannot be read"] if len(lines) > LISTED else []
    return [f"left out: {line}" for line in lines[:LISTED]] + more


def _fingerprints(content: Mapping[str, Any]) -> dict[str, Any]:
    data = content.get("data")
    found = data.get("fingerprint") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}
