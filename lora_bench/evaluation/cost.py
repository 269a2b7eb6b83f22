"""What training costs: arithmetic from torch's own counter, peak memory of this process.

Matrix products of a network are, for N rows of T tokens, exactly c0 + N (c1 + c2 T + c3 T²): linear layers go with T,
attention with T², the head with N, products of weights with nothing. Four small probes give the four numbers, for any
family and method; the rest is a sum over the batches that were run.
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
    from collections.abc import Callable

_PROBES = ((1, 8), (1, 16), (1, 24), (2, 8))  # (N, T)


@dataclass(frozen=True)
class FlopModel:
    """FLOPs of one call as a function of rows and tokens; a multiplication and an addition count as two."""

    coefficients: tuple[float, float, float, float]

    @classmethod
    def measure(cls, call: Callable[[int, int], object]) -> FlopModel:
        """Fit the four numbers from `call(N, T)`, run on batches of those sizes."""
        counts = []
        for rows, length in _PROBES:
            with FlopCounterMode(display=False) as counter:
                call(rows, length)
            counts.append(counter.get_total_flops())
        terms = np.array([[1, n, n * t, n * t * t] for n, t in _PROBES], np.float64)
        c0, c1, c2, c3 = np.linalg.solve(terms, np.array(counts, np.float64))
        return cls((float(c0), float(c1), float(c2), float(c3)))

    def __call__(self, rows: int, length: int) -> float:
        c0, c1, c2, c3 = self.coefficients
        return c0 + rows * (c1 + c2 * length + c3 * length * length)


def reset_peak_memory(device: torch.device) -> None:
    """Start the measurement of peak memory anew, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        gc.collect()  # an earlier run of this process may have left a backbone behind
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would count as this run's
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident set size of this process


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since the reset: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    told = _told_by_linux("VmHWM")
    if told is not None:
        return told
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory_bytes(device: torch.device) -> int:
    """Memory held now, as `peak_memory_bytes` counts it; the peak where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    told = _told_by_linux("VmRSS")
    return peak_memory_bytes(device) if told is None else told


def _told_by_linux(name: str) -> int | None:
    """A size of this process, in bytes; None where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
