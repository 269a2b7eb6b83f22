"""Names and the threshold of the metrics, in one place for every folder that computes, records or prints them.

They stand here and not in `evaluation`, because the console, which `evaluation` builds on, prints them too.
"""

from __future__ import annotations

MAIN_METRICS = ("accuracy", "f1", "mcc")
"""Metrics that are always shown, in this order; the others stay in run.json."""

DEFAULT_THRESHOLD = 0.5
"""Label 1 is predicted from this score P(label 1) on, in every metric: no threshold is tuned on a reported split."""

_DISPLAY_NAMES = {"mcc": "MCC", "f1": "F1"}


def display_name(metric: str) -> str:
    """Return the name of a metric as papers spell it, and a name without such a spelling unchanged."""
    return _DISPLAY_NAMES.get(metric, metric)
