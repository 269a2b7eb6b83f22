"""Cost of training: FLOPs from torch's own counter, and the memory of this process.

The FLOPs of a network on N rows of T tokens are exactly c0 + N (c1 + c2 T + c3 T²): linear layers grow with T,
attention with T², the head with N, products of weights with neither. Four small probes determine the four coefficients
for any model family and method. The total is a sum over the batches that were run.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PROBES = ((1, 8), (1, 16), (1, 24), (2, 8))  # (N, T)


@dataclass(frozen=True)
class FlopModel:
    """FLOPs of one call as a function of rows and tokens; a multiplication and an addition count as two."""

    coefficients: tuple[float, float, float, float]
    """(c0, c1, c2, c3) of c0 + N (c1 + c2 T + c3 T²)."""

    @classmethod
    def measure(cls, call: Callable[[int, int], object]) -> FlopModel:
        """Fit the four coefficients by counting the FLOPs of `call(N, T)` for four sizes of batch.

        It is called with N = 1 and T = 8, 16 and 24, and with N = 2 and T = 8.
        """
        counts = []
        for rows, length in _PROBES:
            with FlopCounterMode(display=False) as counter:
                call(rows, length)
            counts.append(counter.get_total_flops())
        return cls.fit(counts)

    @classmethod
    def fit(cls, counts: Sequence[int]) -> FlopModel:
        """Fit the four coefficients to FLOPs that were counted in the calls of `measure`, in their order."""
        terms = np.array([[1, n, n * t, n * t * t] for n, t in _PROBES], np.float64)
        c0, c1, c2, c3 = np.linalg.solve(terms, np.array(counts, np.float64))
        return cls((float(c0), float(c1), float(c2), float(c3)))

    def __call__(self, rows: int, length: int) -> float:
        """Return the FLOPs of one call on `rows` rows of `length` tokens."""
        c0, c1, c2, c3 = self.coefficients
        return c0 + rows * (c1 + c2 * length + c3 * length * length)


def reset_peak_memory(device: torch.device) -> None:
    """Start the measurement of peak memory anew, where the operating system allows it.

    On a GPU it is the allocator's peak. On Linux it is the resident memory of this process, which is trimmed first;
    elsewhere nothing is done.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        gc.collect()  # an earlier run of this process may have left a backbone behind
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would count as this run's
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident set size of this process


def peak_memory_bytes(device: torch.device) -> int:
    """Return the highest memory since the reset: allocated on the GPU, or resident in this process.

    Without Linux's /proc it is the highest since the process started.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    resident_bytes = _linux_process_bytes("VmHWM")
    if resident_bytes is not None:
        return resident_bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory_bytes(device: torch.device) -> int:
    """Return the memory held now, measured as by `peak_memory_bytes`; the peak where the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    resident_bytes = _linux_process_bytes("VmRSS")
    return peak_memory_bytes(device) if resident_bytes is None else resident_bytes


def _linux_process_bytes(name: str) -> int | None:
    """Return a size from /proc/self/status in bytes; None where the system has no such file or entry."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
