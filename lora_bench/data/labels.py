"""Advice for labels that are neither 0 nor 1: what to write in the file, or which key to give."""

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
    """Return a foreign value as a message shows it: escaped and cut short."""
    return _repr.repr(value)


def advise(values: Sequence[Any], bad: int, label_names: Sequence[str], may_hide: bool) -> str:
    """Say how labels other than 0 and 1 become such.

    Args:
        values: the column.
        bad: the position of the first that is neither.
        label_names: what the task calls 0 and 1.
        may_hide: -1 may stand for no label.
    """
    label = values[bad]
    if label in label_names:
        pairs = " and ".join(f"{i} for {excerpt(name)}" for i, name in enumerate(label_names))
        return f"data.label_names only says what 0 and 1 are called: write {pairs} in the file."
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
