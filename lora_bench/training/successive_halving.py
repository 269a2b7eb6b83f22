"""Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): the worse half of a pack is eliminated.

After 1/2^j of the steps at most 2^(j−1) members survive: of eight, four after an eighth of the steps, two after a
quarter, one after half of them. Eight members then take 2.5 times the computation of one, instead of 8 times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def survivors(step: int, steps: int) -> int:
    """Return the number of members that may survive update `step` of `steps`: 1 from half of the steps on.

    It is 2 from a quarter, 4 from an eighth, and so on. The limit holds after every update, so that a member that
    should have been eliminated before the process was killed is eliminated soon after it is resumed.
    """
    share = 2
    while steps // share > step:
        share *= 2
    return share // 2


def members_by_step(members: int, steps: int) -> list[int]:
    """Return the number of members that compute each of the `steps` updates, starting with `members`."""
    counts = []
    for step in range(1, steps + 1):
        counts.append(members)
        if step < steps:
            members = min(members, survivors(step, steps))
    return counts


def eliminated(scores: Mapping[int, tuple[float, float]], limit: int) -> list[int]:
    """Return the members to eliminate, in ascending order: all but the `limit` best.

    Args:
        scores: main metric and AUROC by member. AUROC decides among equal ones, for example among members that still
            predict the same label for every pair, whose MCC is 0. Of equal members the earlier ones survive.
        limit: number of survivors.
    """
    return sorted(sorted(scores, key=lambda member: scores[member], reverse=True)[limit:])
