"""What a frozen prefix made of every token of a table, kept in a file: read in rows, never held whole.

The file holds (sum of lengths, D) numbers, without padding, in the order of the table. It is mapped for each batch and
let go of, so that the system keeps as much of it in memory as there is room for and the process's own memory stays
flat. The descriptor is held: who deletes the file to make room does not disturb whoever reads it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# numpy has no bf16; its bits are moved as integers.
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.int16),
    torch.float64: np.dtype(np.float64),
}


class HiddenStates:
    """The stored output of a prefix.

    Args:
        path: the file, complete.
        width: D, numbers per token.
        dtype: their format.
    """

    def __init__(self, path: Path, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self._descriptor = os.open(path, os.O_RDONLY)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def read(self, places: NDArray[np.int64], kept: NDArray[np.bool_]) -> torch.Tensor:
        """Tokens at `places` (N, T) as (N, T, D), zeros where `kept` (N, T) says that there is none."""
        kind = _NUMPY[self.dtype]
        found = np.zeros((*places.shape, self.width), kind)
        with mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ) as mapped:
            stored = np.frombuffer(mapped, kind).reshape(-1, self.width)
            found[kept] = stored[places[kept]]
            del stored  # a map with views cannot be closed
        return torch.from_numpy(found).view(self.dtype)


class HiddenStatesWriter:
    """A file of hidden states being made: room is taken at once, rows come in any order.

    Raises:
        OSError: there is no room for it.
    """

    def __init__(self, path: Path, tokens: int, width: int, dtype: torch.dtype) -> None:
        kind = _NUMPY[dtype]
        with path.open("wb") as file:
            # A full disk is told here and not by a signal in the midst of writing.
            os.posix_fallocate(file.fileno(), 0, tokens * width * kind.itemsize)
        self._path, self._kind, self._shape = path, kind, (tokens, width)

    def write(self, places: NDArray[np.int64], kept: NDArray[np.bool_], hidden: torch.Tensor) -> None:
        """Put (N, T, D) at `places` (N, T), but for those tokens that `kept` calls padding."""
        bits = hidden.contiguous().view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden
        # Mapped for each batch: pages of a map that stays would count as this process's memory, and become gigabytes.
        stored: np.memmap[Any, Any] = np.memmap(self._path, self._kind, "r+", shape=self._shape)
        stored[places[kept]] = bits.numpy()[kept]

    def flush(self) -> None:
        """See to it that what was written is on the disk."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
