"""The lock of a folder: one process at a time may write it, and only while that process lives.

The lock is an operating-system lock on the file `.lock` in the folder. It ends with its process, however the process
ends, so a killed process blocks nobody, and no process number has to be trusted. While a process runs, its path can be
made to lead to another folder: `Claim.check` detects that, and is called before every write.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from lora_bench.errors import Code, LostFolderError

if TYPE_CHECKING:
    from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCK_FILE = ".lock"
TIMEOUT_SECONDS = 0.5
"""Time to wait for a lock: `is_locked` holds it for a moment."""


@dataclass(frozen=True)
class Identity:
    """The identity of a folder's lock file in the file system, which stays the same if the folder is moved."""

    folder: Path
    device: int
    inode: int

    @classmethod
    def of(cls, folder: Path) -> Identity:
        """Return the identity of a folder that holds a lock file.

        Raises:
            OSError: there is no lock file.
        """
        status = os.stat(folder / LOCK_FILE)
        return cls(folder, status.st_dev, status.st_ino)

    def check(self) -> None:
        """Refuse to write if the path does not lead to this folder any more.

        Raises:
            LostFolderError: the folder was deleted or moved, another folder has its path, or its lock file was removed.
        """
        try:
            if Identity.of(self.folder) == self:
                return
        except OSError:
            if not os.path.exists(self.folder):
                raise LostFolderError(
                    "was deleted or moved while the run trained", file=self.folder, code=Code.LOST
                ) from None
        reason = "was replaced by another folder while the run trained; nothing is written into the new folder"
        raise LostFolderError(
            reason, file=self.folder, remedy="Look for the original folder where it was moved to.", code=Code.LOST
        )


@dataclass(frozen=True)
class Claim:
    """The right of this process to write a folder, until it is released or the process ends."""

    lock: FileLock
    identity: Identity

    def check(self) -> None:
        """Refuse to write if the path does not lead to the claimed folder any more (`Identity.check`)."""
        self.identity.check()

    def release(self) -> None:
        """Give up the right, so that another process can claim the folder."""
        self.lock.release()


def acquire(folder: Path) -> Claim | None:
    """Claim a folder; None if a process, this one included, still holds its lock after `TIMEOUT_SECONDS`.

    A missing folder or lock file is created.

    Raises:
        OSError: the folder cannot be written.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=TIMEOUT_SECONDS, poll_interval=0.05)
    except Timeout:
        return None
    try:
        return Claim(lock, Identity.of(folder))
    except OSError:
        lock.release()
        raise


def is_locked(folder: Path) -> bool:
    """Return whether a living process holds the lock of a folder, at once; True also if that cannot be determined.

    It is False without a lock file. A shared lock is tried, so that any number of processes can ask at the same time.
    """
    if sys.platform == "win32":
        return _cannot_be_acquired(folder)
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _cannot_be_acquired(folder: Path) -> bool:
    """Return whether the lock of a folder is held, or cannot be acquired; it is acquired for a moment."""
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        lock = acquire(folder)
    except (OSError, NotImplementedError):
        return True
    if lock is not None:
        lock.release()
    return lock is None
