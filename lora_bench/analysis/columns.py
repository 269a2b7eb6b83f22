"""Names and kinds of the columns that a comparison shows."""

from __future__ import annotations

BESIDES = {
    "unseen/f1": "↑",
    "unseen/mcc": "↑",
    "perturbed/f1": "↑",
    "perturbed/f1_drop": "↓",
    "perturbed/flip_rate": "↓",
    "perturbed/attack_success": "↓",
    "perturbed/order_consistency": "↑",
    "members/mcc": "↑",
}
"""Of a split's figures besides its own, those that have columns, and which direction is better."""


def has_column(name: str) -> bool:
    """Whether a figure of a split, without the split's name, is shown in tables."""
    return "/" not in name or name in BESIDES
