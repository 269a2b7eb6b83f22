"""The later evaluations of finished runs (`lora-bench eval`), as they are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_bench.files import untrusted
from lora_bench.files.atomic_io import describe_error, to_json
from lora_bench.files.untrusted import as_number
from lora_bench.records.run_folder import EVALUATIONS, METRICS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

UNREADABLE = "unreadable_files"
"""A key that `add_evaluations` adds to a record: files of the run's folder that cannot be read, with the reasons."""

TITLES = "evaluation_titles"
"""A key that `add_evaluations` adds to a record: the titles of evaluations whose name stands for other data in another
run, by `name:split`."""

MAX_NOTES = 5
"""Unreadable files that are named in notes."""


@dataclass(frozen=True)
class Evaluation:
    """A later evaluation of a finished run."""

    metrics: dict[str, Any]
    """Numbers by `split/metric`."""
    fingerprints: dict[str, Any]
    """Fingerprint of the data, by split."""
    path: str | None = None
    """`data.path` as it was given; None for other data than local files."""


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """Return the evaluations in a run's folder, by name; damaged files are skipped, and a missing folder has none."""
    return _evaluations(folder)[0]


def _evaluations(folder: Path) -> tuple[dict[str, Evaluation], list[str]]:
    """Return the evaluations in a run's folder, by name, and a line for each damaged file.

    Metrics that are no numbers are left out.
    """
    by_name, unreadable = {}, []
    for path in sorted((folder / EVALUATIONS).glob("*.json")):
        try:
            content = to_json(untrusted.read_json(path))
            if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
                raise ValueError("it holds no metrics")
        except (OSError, ValueError) as error:
            unreadable.append(f"{path}: {describe_error(error)}")
            continue
        metrics = {key: number for key, value in content["metrics"].items() if (number := as_number(value)) is not None}
        source = content["data"].get("path") if isinstance(content.get("data"), dict) else None
        by_name[path.stem] = Evaluation(metrics, _fingerprints(content), source if isinstance(source, str) else None)
    return by_name, unreadable


def add_evaluations(runs: Iterable[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the runs with copies of their records that have the metrics of their later evaluations.

    A metric on the run's own data, of the same split and fingerprint, is added as `split/metric`, unless the run
    reports it already. A metric on other data is added as `<evaluation>:split/metric`. If an evaluation's name stands
    for several data, the beginning of their fingerprint is added to it, as in `paws (0a1b2c3d):test/mcc`. The records
    also have the keys `UNREADABLE` and `TITLES`. `UNREADABLE` has a line for the run's log too if that cannot be read.

    Args:
        runs: folders and records.
    """
    read = [(folder, record, *_evaluations(folder)) for folder, record in runs]
    fingerprints: dict[str, set[str]] = {}
    for _, record, evaluations, _ in read:
        for name, evaluation in evaluations.items():
            for split in _other_splits(record, evaluation):
                fingerprints.setdefault(f"{name}:{split}", set()).add(str(evaluation.fingerprints.get(split)))
    added = []
    for folder, record, evaluations, unreadable in read:
        metrics: dict[str, Any] = dict(record["metrics"])
        titles: dict[str, str] = {}
        for name, evaluation in evaluations.items():
            other_splits = _other_splits(record, evaluation)
            for split in other_splits:
                if len(fingerprints[key := f"{name}:{split}"]) > 1 and split in evaluation.fingerprints:
                    titles[key] = f"{name} ({str(evaluation.fingerprints[split])[:8]})"
            for metric, value in evaluation.metrics.items():
                split = metric.partition("/")[0]
                if split in other_splits:
                    metrics[f"{titles.get(f'{name}:{split}', name)}:{metric}"] = value
                else:
                    metrics.setdefault(metric, value)
        if reason := untrusted.refusal(log := folder / METRICS_FILE):
            unreadable.append(f"{log}: {reason}")
        added.append((folder, {**record, "metrics": metrics, UNREADABLE: unreadable, TITLES: titles}))
    return added


def _other_splits(record: Mapping[str, Any], evaluation: Evaluation) -> set[str]:
    """Return the splits of an evaluation that are not data of the run itself, of the same split and fingerprint."""
    run_fingerprints, fingerprints = _fingerprints(record), evaluation.fingerprints
    splits = {key.partition("/")[0] for key in evaluation.metrics}
    return {name for name in splits if name not in fingerprints or fingerprints[name] != run_fingerprints.get(name)}


def unreadable_notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a note for each unreadable file of these runs; beyond `MAX_NOTES` files, a count of the rest.

    Args:
        records: from `add_evaluations`.
    """
    lines = [line for record in records for line in record[UNREADABLE]]
    rest = [f"{len(lines) - MAX_NOTES} more files cannot be read"] if len(lines) > MAX_NOTES else []
    return [f"left out: {line}" for line in lines[:MAX_NOTES]] + rest


def _fingerprints(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of each split of a record or evaluation; empty if it has none."""
    data = content.get("data")
    fingerprints = data.get("fingerprint") if isinstance(data, dict) else None
    return fingerprints if isinstance(fingerprints, dict) else {}
