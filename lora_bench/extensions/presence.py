"""A fast answer to whether any installed distribution extends lora-bench, for shell completion."""

from __future__ import annotations

import os
import sys

_MARK = b"[lora_bench."


def has_extensions() -> bool:
    """Return whether a distribution in a folder of `sys.path` registers an entry point of lora-bench's groups.

    Only files are read. `entry_points` imports Python's metadata machinery, which takes longer than a key press may.
    """
    return any(_registers(folder) for folder in sys.path if os.path.isdir(folder))


def _registers(folder: str) -> bool:
    """Return whether a distribution in this folder registers one."""
    for name in os.listdir(folder):
        if name.endswith((".dist-info", ".egg-info")):
            try:
                with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                    if _MARK in file.read():
                        return True
            except OSError:
                continue
    return False
