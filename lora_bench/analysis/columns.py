"""Metrics of stress splits and ensemble members that a comparison has columns for."""

from __future__ import annotations

STRESS_COLUMNS = {
    "unseen/f1": "↑",
    "unseen/mcc": "↑",
    "perturbed/f1": "↑",
    "perturbed/f1_drop": "↓",
    "perturbed/flip_rate": "↓",
    "perturbed/attack_success": "↓",
    "perturbed/order_consistency": "↑",
    "members/mcc": "↑",
}
"""Metrics with a column in addition to the main ones, named without the split; the arrow is the better direction."""


def has_column(name: str) -> bool:
    """Return whether a metric, named without its split, has a column.

    Every metric of the split itself may have one; of its stress splits and members only those in `STRESS_COLUMNS`.
    """
    return "/" not in name or name in STRESS_COLUMNS
