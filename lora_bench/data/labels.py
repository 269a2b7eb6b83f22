"""Remedies for labels that are neither 0 nor 1."""

from __future__ import annotations

import math
import reprlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
_repr.maxlist = 20


def excerpt(value: Any) -> str:
    """Return a value of the user's data as messages print it: escaped and shortened."""
    return _repr.repr(value)


def advise(values: Sequence[Any], bad: int, label_names: Sequence[str], may_hide: bool) -> str:
    """Return a sentence that explains how to turn these labels into 0 and 1; empty if there is no advice.

    Args:
        values: the column; at most its first 10,000 values decide.
        bad: the index of the first label that is neither 0 nor 1.
        label_names: the task's names of 0 and 1.
        may_hide: -1 may stand for a hidden label, and is then no value of its own.
    """
    label = values[bad]
    if label in label_names:
        pairs = " and ".join(f"{i} for {excerpt(name)}" for i, name in enumerate(label_names))
        return f"data.label_names only names the labels 0 and 1: write {pairs} in the file."
    distinct = {value: None for value in values[:10_000] if type(value) in (str, int, float, bool)}
    if type(label) is bool:
        return "Write 0 for false and 1 for true."
    numbers: list[float] = []
    with suppress(ValueError, OverflowError):
        numbers = sorted({number for number in map(float, distinct) if not may_hide or number != -1})
    if len(numbers) == 2 and -math.inf < numbers[0] and numbers[1] < math.inf:
        return f"Or give data.label_threshold={numbers[1]:g}: labels are then 1 from there on, and 0 below."
    if len(numbers) > 2:
        return "Numbers of more than two values become 0 and 1 by data.label_threshold, the least that counts as 1."
    if len(distinct) == 2 and type(label) is str:
        return f"Write 0 for one and 1 for the other of {' and '.join(map(excerpt, distinct))}."
    if len(distinct) > 2:
        return "Tasks have two classes: keep the rows of two of the labels, or merge them into two, called 0 and 1."
    return ""
