"""Memory of the process: reuse of freed blocks, and free memory of a device."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
_LARGEST_BLOCK = 32 << 20  # bytes; glibc's own limit for the threshold
_LARGEST_REST = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Make glibc's allocator keep freed blocks of the size of activations for the next step.

    By default each such block is mapped, zeroed page by page and unmapped at every use. The kept memory is returned to
    the system when the measurement of a run's peak memory starts. Only effective on Linux with glibc.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
            libc.mallopt(_TRIM_THRESHOLD, _LARGEST_REST)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device; for a CPU the system's available memory.

    Where `/proc/meminfo` does not tell it, that is half of the installed memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
