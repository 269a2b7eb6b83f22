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


TRANSIENT = 1.5
"""Peak memory of a step, as a multiple of the tensors that it saves for its backward pass."""


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


def trim_freed_memory() -> None:
    """Return freed memory to the system, where glibc allows it.

    Quantised weights lie between the blocks that quantising them needed for a moment.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device.

    For a CPU it is the system's available memory, or what a cgroup's limit leaves of it. Where `/proc/meminfo` does not
    tell the former, that is half of the installed memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limits = (_cgroup_bytes(folder) for folder in _CGROUPS)
    return min([available, *(limit for limit in limits if limit is not None)])


_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
"""Folder, limit and use of memory of a container, in cgroups of version 2 and 1."""


def _cgroup_bytes(cgroup: tuple[Path, str, str]) -> int | None:
    """Return the bytes that a cgroup's limit leaves, file cache counted as free; None without a limit."""
    folder, limit, used = cgroup
    try:
        most, held = int((folder / limit).read_text()), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such cgroup, or its limit is `max`
        return None
    return max(0, most - held + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))
