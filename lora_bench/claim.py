"""Which process may write a folder: one at a time, and only while it lives.

The claim is a lock of the operating system's on the file `.lock` in the folder. It ends with its process however that
ends, so what a killed process leaves behind is in nobody's way, and no process number has to be trusted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from pathlib import Path

LOCK = ".lock"
PATIENCE_SECONDS = 0.5
"""Whoever only asks whether a folder is taken holds its lock for a moment."""


def take(folder: Path) -> FileLock | None:
    """The folder's lock, to be released by its owner or by the owner's end; None where another owner holds it.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=0.05)
    except Timeout:
        return None
    return lock


def is_taken(folder: Path) -> bool:
    """Whether a living process writes there; also said where it cannot be found out."""
    if not (folder / LOCK).exists():
        return False
    try:
        lock = take(folder)
    except (OSError, NotImplementedError):
        return True
    if lock is not None:
        lock.release()
    return lock is None
