"""The score: how many of the 48 cases pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CASES = range(1, 49)


def tell(passed: Mapping[int, Sequence[bool]]) -> str:
    """One line: the score, and which cases are missing.

    Args:
        passed: for each number of a case, whether each of its tests passed; a skipped one is not among them.
    """
    missing = [number for number in CASES if not passed.get(number) or not all(passed[number])]
    score = f"reliability: {len(CASES) - len(missing)} of {len(CASES)}"
    return f"{score}; missing: {', '.join(map(str, missing))}" if missing else score
