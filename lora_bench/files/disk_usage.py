"""The bytes that files and folders hold."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def disk_usage(path: Path) -> int:
    """Return the bytes of a file, or of all regular files below a folder; links are not followed.

    What is missing, or cannot be read, counts nothing.
    """
    total = 0
    with suppress(OSError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        if stat.S_ISDIR(status.st_mode):
            for folder, _, names in os.walk(path):
                for name in names:
                    with suppress(OSError):
                        below = os.lstat(os.path.join(folder, name))
                        total += below.st_size if stat.S_ISREG(below.st_mode) else 0
    return total
