"""Configuration keys and choices that existed in earlier versions and were removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

REMOVED_KEYS: dict[str, float] = {
    "trainer.label_smoothing": 0.0,
    "trainer.focal_gamma": 0.0,
    "trainer.margin": 0.0,
    "trainer.logit_adjustment": 0.0,
}
"""Removed keys, with the default at which they changed nothing."""

REMOVED_CHOICES = {("trainer.objective", "dropout_consistency"): "cross_entropy"}
"""Removed choices of keys that still exist, with the choice that a finished run is loaded with instead."""

REMOVED_GROUPS = ("pack", "ensemble")
"""Removed configuration groups, each with the single choice `default`; their keys still exist."""

REMOVAL = "removed in version 0.2.0, because it improved no score over trainer.objective=cross_entropy"


def removal_note(key: str, value: object = None) -> str | None:
    """Return sentences on why a key, whatever its value, or this choice of a key was removed; None if neither was."""
    if key in REMOVED_KEYS:
        return f"It was {REMOVAL}. Leave it out."
    if (key, str(value)) in REMOVED_CHOICES:
        return f"{value} was {REMOVAL}."
    return None


def removed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the removed keys, and keys with removed choices, that influenced a recorded run's training.

    Returns:
        The recorded value by dotted key; empty if there are none.
    """
    recorded = {
        f"{group}.{name}": value
        for group, node in config.items()
        if isinstance(node, dict)
        for name, value in node.items()
    }
    return {
        key: value
        for key, value in recorded.items()
        if (key in REMOVED_KEYS and value != REMOVED_KEYS[key]) or (key, str(value)) in REMOVED_CHOICES
    }
