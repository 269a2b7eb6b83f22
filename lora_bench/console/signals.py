"""Signals that end a command: SIGTERM, and SIGHUP where there is one."""

from __future__ import annotations

import signal

ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def terminate(number: int, frame: object) -> None:
    """End the process as a shell reports it: with 128 and the signal's number, after everything has been cleaned up."""
    raise SystemExit(128 + number)
