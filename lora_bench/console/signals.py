"""Signals that end a command: SIGTERM, and SIGHUP where there is one."""

from __future__ import annotations

import signal

ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command after cleanup."""


def terminate(number: int, frame: object) -> None:
    """Handle a signal: raise `SystemExit` with 128 plus its number, the exit code that shells use."""
    raise SystemExit(128 + number)
