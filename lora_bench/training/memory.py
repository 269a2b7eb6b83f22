"""Memory of the process: what a step frees, the next step gets back without asking the system."""

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
    """Let glibc keep blocks of activations' size for the next step.

    By its defaults each is mapped, zeroed page by page and unmapped at every use. Elsewhere than on Linux with glibc
    nothing happens. What is kept is given back when a run's measurement of peak memory begins.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
            libc.mallopt(_TRIM_THRESHOLD, _LARGEST_REST)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on the device; for a CPU what the system calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
