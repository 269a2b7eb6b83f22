"""Arrow columns from NumPy arrays and back, without pandas: pyarrow's own conversions import it, for 0.4 seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray


def to_arrow(values: NDArray[Any]) -> pa.Array:
    """Return numbers (N,) as an Arrow array of their type, without a copy where they are contiguous; NaN stays NaN."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def to_numpy(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return the numbers of an Arrow column as a read-only array: (N,).

    Raises:
        ValueError: a value is null.
    """
    if column.null_count:
        raise ValueError(f"{column.null_count} values are null")
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.from_dlpack(array)
