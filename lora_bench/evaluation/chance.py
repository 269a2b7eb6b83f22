"""Runs that learned nothing: their MCC is within what guessing gives. Needs no numpy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

LOWEST, HIGHEST = 0.02, 0.1
"""Bounds of the MCC up to which a run counts as one that learned nothing."""


def chance_mcc(examples: int | None) -> float:
    """Return the MCC up to which predictions count as guessed.

    The MCC of guesses on N examples has a standard deviation of 1 / sqrt(N) (N MCC² is the chi-squared statistic of the
    confusion table), so one in twenty exceeds 1.645 / sqrt(N). On few examples the bound is 0.1, on many 0.02.

    Args:
        examples: number of examples; None if it is not known.
    """
    return LOWEST if not examples else min(HIGHEST, max(LOWEST, 1.645 / math.sqrt(examples)))


def describe_failure(metrics: Mapping[str, Any], split: str, examples: int | None) -> str | None:
    """Return the reason that a run counts as one that learned nothing, or None.

    A run counts as one if its MCC on the split is at most `chance_mcc(examples)`. Without an MCC it does not.

    Args:
        metrics: results by `<split>/<metric>`.
        split: the split to judge by.
        examples: its number of examples; None if it is not known, which is judged like a large number.
    """
    mcc, recall = metrics.get(f"{split}/mcc"), metrics.get(f"{split}/recall")
    if not isinstance(mcc, int | float) or isinstance(mcc, bool) or mcc > chance_mcc(examples):
        return None
    if mcc == 0 and recall in (0, 1):
        return f"it predicts label {recall:.0f} for every example"
    return f"its {split} MCC of {mcc:.3f} is not above chance"


def failure_notes(record: Mapping[str, Any]) -> list[str]:
    """Return a note for each reported split on which a finished run, or a task of it, learned nothing.

    Args:
        record: the content of `run.json`.
    """
    metrics, rows = record["metrics"], record["data"].get("rows")
    notes = []
    for prefix in (key.removesuffix("/mcc") for key in metrics if key.endswith("/mcc")):
        split, _, task = prefix.partition("/")
        if split in ("train", "selection") or (task and task not in record["config"].get("tasks", {})):
            continue
        examples = rows.get(prefix, rows.get(split)) if isinstance(rows, dict) else None
        reason = describe_failure(metrics, prefix, examples if isinstance(examples, int) else None)
        if reason is not None:
            subject = f"the run learned nothing of {task}" if task else "the run learned nothing"
            notes.append(f"{subject}: {reason}. Try another optimizer.lr, more steps, or more data.")
    return notes
