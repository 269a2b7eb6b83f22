"""What the rest of the package knows of the runs of `lora-bench prompt`, which asked a model and trained nothing.

They stand in one table with trained runs, which have other keys in their configs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ASKS_THE_REST = "The same `lora-bench prompt` again asks only for the answers that are missing."

# How fast and how long to ask changes no answer: such runs are of one experiment.
OUTSIDE_THE_EXPERIMENT = frozenset(
    f"llm.{name}"
    for name in (
        *("api_key_env", "concurrency", "requests_per_minute", "timeout", "retries"),
        *("max_requests", "max_cost", "input_price", "output_price"),
    )
)

# What names a run, and so is told of each wherever trained and prompted runs meet.
_NAMES = ("model", "adapter", "prompt", "llm.model", "predictions")


def is_prompted(record: Mapping[str, Any]) -> bool:
    """Whether a record is that of a run of `lora-bench prompt`."""
    return "llm" in record["config"]


def differs(key: str, runs: Iterable[tuple[Mapping[str, Any], Mapping[str, str]]]) -> bool:
    """Whether runs differ in a key, so that a table of them needs a column for it.

    A key that one kind of run has (trained, prompted, with answers from a file) and another has not differs where the
    runs of that kind do; what names a run always tells the kinds apart.

    Args:
        key: of the config.
        runs: the record of each, and the values of its keys as text.
    """
    kinds: dict[tuple[bool, bool], set[str | None]] = {}
    for record, values in runs:
        kind = (is_prompted(record), "predictions" in values)
        kinds.setdefault(kind, set()).add(values.get(key))
    if len(kinds) > 1 and key in _NAMES:
        return True
    given = set().union(*kinds.values()) - {None}
    return len(given) > 1 or any(len(values) > 1 for values in kinds.values())
