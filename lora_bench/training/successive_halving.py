"""Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): the worse half of a pack is eliminated.

After 1/2^j of the steps at most 2^(j−1) members survive: of eight, four after an eighth of the steps, two after a
quarter, one after half of them. Eight members then take 2.5 times the computation of one, instead of 8 times.

Members are ranked by AUROC where the task has it. In the middle of training, metrics of labels such as MCC say more
about how far the scores are from the threshold than about the member: on QQP with MiniLM, AUROC after a quarter of the
steps put rank 32, at the learning rate that proved the best, first of the four that were left, and MCC last (LOG.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


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


def rank_by(metrics: Mapping[str, Any], main_metric: str) -> tuple[float, float]:
    """Return what members are ranked by: AUROC, and then the main metric; without AUROC the main metric alone.

    Args:
        metrics: of the selection split, by name. AUROC is absent or None for numbers, and if a class is missing.
        main_metric: the metric that chooses the state of each member.
    """
    main, auroc = float(metrics[main_metric]), metrics.get("auroc")
    return (main if auroc is None else float(auroc), main)


def eliminated(scores: Mapping[int, tuple[float, float]], limit: int) -> list[int]:
    """Return the members to eliminate, in ascending order: all but the `limit` best.

    Args:
        scores: `rank_by` of each member. Of equal members the earlier ones survive.
        limit: number of survivors.
    """
    return sorted(sorted(scores, key=lambda member: scores[member], reverse=True)[limit:])
