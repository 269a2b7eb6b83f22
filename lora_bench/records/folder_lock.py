"""Which process may write a folder: one at a time, and only while it lives.

The claim is a lock of the operating system's on the file `.lock` in the folder. It ends with its process however that
ends, so what a killed process leaves behind is in nobody's way, and no process number has to be trusted. A path can
come to name another folder while its process runs: `Claim.check` notices that, and is called before every write.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lora_bench.errors import Code, LostFolderError

if TYPE_CHECKING:
    from pathlib import Path

LOCK_FILE = ".lock"
PATIENCE_SECONDS = 0.5
"""Whoever only asks whether a folder is taken holds its lock for a moment."""


@dataclass(frozen=True)
class Identity:
    """The lock file of a folder as the file system knows it, whatever its path names later."""

    folder: Path
    device: int
    inode: int

    @classmethod
    def of(cls, folder: Path) -> Identity:
        """Return the identity of a folder that holds a lock file now."""
        found = os.stat(folder / LOCK_FILE)
        return cls(folder, found.st_dev, found.st_ino)

    def check(self) -> None:
        """Refuse to write where the path does not lead to this folder any more.

        Raises:
            LostFolderError: the folder is gone, or another one has its place.
        """
        try:
            if Identity.of(self.folder) == self:
                return
        except OSError:
            if not os.path.exists(self.folder):
                raise LostFolderError(
                    "was deleted or moved while the run trained", file=self.folder, code=Code.LOST
                ) from None
        reason = "was replaced by another folder while the run trained, and nothing is written into that one"
        raise LostFolderError(
            reason, file=self.folder, remedy="Look for the first one where it was moved to.", code=Code.LOST
        )


@dataclass(frozen=True)
class Claim:
    """The right of this process to write a folder, to be released by its owner or by the owner's end."""

    lock: FileLock
    identity: Identity

    def check(self) -> None:
        """Refuse to write where the path does not lead to the claimed folder any more (`Identity.check`)."""
        self.identity.check()

    def release(self) -> None:
        self.lock.release()


def acquire(folder: Path) -> Claim | None:
    """Claim the folder; None where another owner holds it.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=0.05)
    except Timeout:
        return None
    try:
        return Claim(lock, Identity.of(folder))
    except OSError:
        lock.release()
        raise


def is_locked(folder: Path) -> bool:
    """Whether a living process writes there; also said where it cannot be found out."""
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        lock = acquire(folder)
    except (OSError, NotImplementedError):
        return True
    if lock is not None:
        lock.release()
    return lock is None
