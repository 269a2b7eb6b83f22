"""Return the memory of tensors that are mapped from a file to the system."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from mmap import PAGESIZE
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_MADV_PAGEOUT = 21  # of linux/mman.h; unlike MADV_DONTNEED it never loses what was written


def page_out(tensor: Tensor) -> None:
    """Let the system take back the pages that hold a tensor; they are read from its file again when they are needed.

    Only effective on Linux, and for a tensor on the CPU.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu":
        start = -(-tensor.data_ptr() // PAGESIZE) * PAGESIZE
        size = (tensor.data_ptr() + tensor.nbytes - start) // PAGESIZE * PAGESIZE
        if size > 0:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_PAGEOUT)
