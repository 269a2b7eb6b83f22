"""Cached output of the frozen prefix for every token of a table, in a file that is read row by row.

The file holds (sum of lengths, D) numbers, without padding, in the order of the table. Rows are read for each batch, so
the operating system caches as much of it as memory allows, and the process's own memory does not grow. It is not
mapped, because a mapped file that is truncated kills the process. The file is kept open, so it may be deleted to free
space.
"""

from __future__ import annotations

import errno
import os
import weakref
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from lora_bench.errors import Code, RunFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

# numpy has no bf16; its bits are moved as integers.
_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.bfloat16: np.dtype(np.int16),
    torch.float64: np.dtype(np.float64),
}


class HiddenStates:
    """The cached output of a prefix.

    Args:
        path: of the file, for messages.
        file: open, complete and verified; closed with this object.
        width: D, numbers per token.
        dtype: their format.
    """

    def __init__(self, path: Path, file: BinaryIO, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype = width, dtype
        self._path, self._file = path, file
        self._close = weakref.finalize(self, file.close)

    def read(self, positions: NDArray[np.int64], is_token: NDArray[np.bool_]) -> torch.Tensor:
        """Return the tokens at `positions` (N, T) as (N, T, D), zeros where `is_token` (N, T) is False.

        The tokens of a row are consecutive in the file, and its padding comes last.

        Raises:
            RunFailedError: the file was cut short, or can no longer be read.
        """
        states = np.zeros((*positions.shape, self.width), _NUMPY[self.dtype])
        try:
            for row, start, count in _rows(positions, is_token):
                stored = states[row, :count]
                if os.preadv(self._file.fileno(), [stored.data], start * stored[0].nbytes) != stored.nbytes:
                    raise OSError(errno.EIO, "it was cut short")
        except OSError as error:
            reason = f"the cached prefix can no longer be read ({error.strerror})"
            remedy = "Resume the run: the prefix is then computed again."
            raise RunFailedError(reason, file=self._path, remedy=remedy, code=Code.UNREADABLE) from None
        return torch.from_numpy(states).view(self.dtype)


class HiddenStatesWriter:
    """A writer of hidden states to a file; space is allocated at once, rows are written in any order.

    Args:
        file: open for writing; it is not closed here.
        tokens: number of tokens of all rows.
        width: D, numbers per token.
        dtype: their format.

    Raises:
        OSError: the disk has too little space.
    """

    def __init__(self, file: BinaryIO, tokens: int, width: int, dtype: torch.dtype) -> None:
        self._file = file
        size_bytes = tokens * width * _NUMPY[dtype].itemsize
        if hasattr(os, "posix_fallocate"):  # a full disk is noticed before anything is computed
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        else:
            file.truncate(size_bytes)

    def write(self, positions: NDArray[np.int64], is_token: NDArray[np.bool_], hidden: torch.Tensor) -> None:
        """Write hidden states (N, T, D) to `positions` (N, T), except where `is_token` (N, T) is False.

        The tokens of a row are consecutive in the file, and its padding comes last.

        Args:
            positions: of the tokens in the file.
            is_token: False for padding.
            hidden: on the CPU, in the dtype of the file.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        bits = hidden.contiguous().view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden.contiguous()
        states = bits.numpy()
        for row, start, count in _rows(positions, is_token):
            stored = states[row, :count]
            if os.pwrite(self._file.fileno(), stored.data, start * stored[0].nbytes) != stored.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _rows(positions: NDArray[np.int64], is_token: NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, position of the first token, number of tokens) of each row that has tokens.

    The padding of a row comes last.
    """
    for row, (start, count) in enumerate(zip(positions[:, 0].tolist(), is_token.sum(1).tolist(), strict=True)):
        if count:
            yield row, start, count
