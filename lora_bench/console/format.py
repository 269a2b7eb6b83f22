"""Formatting of numbers, durations and untrusted texts for a terminal."""

from __future__ import annotations

import unicodedata


def to_single_line(text: str) -> str:
    """Return the text on one line: in NFC, each white space character as a space, unprintable characters escaped.

    A terminal escape becomes \\x1b. Spaces in a row stay.
    """
    return "".join(
        char if char.isprintable() else " " if char.isspace() else char.encode("unicode_escape").decode()
        for char in unicodedata.normalize("NFC", text)
    )


def format_number(value: float, unit: str = "") -> str:
    """Return a number of at most three digits with an SI prefix: `1.3 M`, and `540 MB` for the unit `B`.

    Below 1000 it is rounded to a whole number.
    """
    sizes = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    prefix = next((name for name, size in sizes.items() if abs(value) >= 0.9995 * size), "")
    scaled = value / sizes.get(prefix, 1)
    return f"{scaled:.{1 if prefix and abs(scaled) < 9.95 else 0}f} {prefix}{unit}".strip()


def format_duration(seconds: float) -> str:
    """Return a duration: `2.5 s`, `42 s` up to 10 minutes, `15 min` up to 2 hours, `2.1 h`."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_p(p: float | None) -> str:
    """Return a p value with its sign of equality: `p = 0.012`, `p < 0.001`; `p unknown` for None."""
    return "p unknown" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
