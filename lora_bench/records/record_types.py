"""The types of what a run's record holds: whoever reads one may rely on them, whoever wrote it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_bench.files.untrusted import as_number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
_MEASURED = ("metrics", "params", "cost")
"""Sections of numbers: what is none is absent."""
_GROUPS = ("model", "adapter", "data", "optimizer", "trainer")
"""Keys of a finished run's config that have keys of their own."""


def with_types(record: Any, layout: Mapping[str, type], *, schema: int, statuses: Sequence[str]) -> dict[str, Any]:
    """Return the record with every key of the layout.

    Args:
        record: what `run.json` holds.
        layout: the type of each key.
        schema: the one that is read here.
        statuses: those that a run can have.

    Raises:
        ValueError: it is no record of this schema, or holds something of another type than its readers rely on.
    """
    if not isinstance(record, dict):
        raise ValueError("is not a run's record: it holds no object")
    if record.get("schema") != schema:
        found = f"schema {str(record['schema'])[:40]}" if "schema" in record else "no schema"
        raise ValueError(f"has {found}, where this version of lora-bench reads {schema}")
    if record.get("status") not in statuses:
        raise ValueError(f"has no status among {', '.join(statuses)}")
    for key, kind in layout.items():
        if record.get(key) is None:
            record[key] = kind() if kind in (dict, list) else None
        _require(record[key] is None or isinstance(record[key], kind), f"{key} is not {_NAMES[kind]}")
    for group, choice in record["choices"].items():
        _require(choice is None or isinstance(choice, str), f"choices.{group[:80]} is not text")
    _require(all(isinstance(text, str) for text in record["overrides"]), "overrides holds what is not text")
    for name, ranks in record["targets"].items():
        each = ranks if isinstance(ranks, list) else [ranks]  # an ensemble's members may differ
        _require(all(as_number(rank) is not None for rank in each), f"targets.{name[:80]} is no rank")
    config = record["config"]
    if record["status"] == "done":
        for group in _GROUPS:
            _require(isinstance(config.get(group, {}), dict), f"config.{group} is not an object")
    if isinstance(tasks := config.get("tasks"), dict):
        _require(all(re.fullmatch(r"\w[\w.-]*", name) for name in tasks), "config.tasks has a name that is not plain")
    return record | {key: {name: as_number(value) for name, value in record[key].items()} for key in _MEASURED}


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise ValueError(f"is damaged: {reason}")
