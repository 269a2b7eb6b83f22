"""The types of a run's record, checked as it is read: records are untrusted, and their readers rely on types."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_bench.files.untrusted import as_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
_MEASURED = ("metrics", "params", "cost")
"""Sections of numbers; a value that is not a number becomes null."""
_GROUPS = ("model", "adapter", "data", "optimizer", "trainer")
"""Groups of a finished run's config."""


def with_types(record: Any, layout: Mapping[str, type], *, schema: int, statuses: Sequence[str]) -> dict[str, Any]:
    """Return a record with every key of the layout; absent keys are empty or null.

    Values of metrics, params and cost that are no numbers become null. Keys outside of the layout stay.

    Args:
        record: the content of `run.json`; keys are added to it.
        layout: the type of each key.
        schema: the number of the supported schema.
        statuses: all statuses of a run.

    Raises:
        ValueError: it is not a record of this schema, or a value has another type than its readers rely on.
    """
    if not isinstance(record, dict):
        raise ValueError("is not a run's record: it is not an object")
    if record.get("schema") != schema:
        actual = f"schema {str(record['schema'])[:40]}" if "schema" in record else "no schema"
        raise ValueError(f"has {actual}; this version of lora-bench reads schema {schema}")
    if record.get("status") not in statuses:
        raise ValueError(f"has a status that is not one of {', '.join(statuses)}")
    for key, type_ in layout.items():
        if record.get(key) is None:
            record[key] = type_() if type_ in (dict, list) else None
        _require(record[key] is None or isinstance(record[key], type_), f"{key} is not {_NAMES[type_]}")
    for group, choice in record["choices"].items():
        _require(choice is None or isinstance(choice, str), f"choices.{group[:80]} is not text")
    _require(all(isinstance(text, str) for text in record["overrides"]), "overrides has an entry that is not text")
    for name, ranks in record["targets"].items():
        by_member = ranks if isinstance(ranks, list) else [ranks]  # an ensemble's members may differ
        _require(all(as_number(rank) is not None for rank in by_member), f"targets.{name[:80]} is not a rank")
    config = record["config"]
    if record["status"] == "done":
        for group in _GROUPS:
            _require(isinstance(config.get(group, {}), dict), f"config.{group} is not an object")
    if isinstance(tasks := config.get("tasks"), dict):
        _require(
            all(re.fullmatch(r"\w[\w.-]*", name) for name in tasks),
            "config.tasks has a name of other characters than letters, digits, . - and _",
        )
    return record | {key: {name: as_number(value) for name, value in record[key].items()} for key in _MEASURED}


def _require(holds: bool, reason: str) -> None:
    """Raise a `ValueError` unless a condition holds."""
    if not holds:
        raise ValueError(f"is damaged: {reason}")
