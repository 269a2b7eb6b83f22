"""Columns of Arrow and arrays of NumPy hold the same numbers, and converting them does not import pandas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from lora_bench.files.arrow import to_arrow, to_numpy


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_there_and_back(dtype: type, count: int) -> None:
    values = np.arange(2 * count).astype(dtype)[::2]  # not contiguous
    column = to_arrow(values)
    assert column.equals(pa.array(values))
    assert column.validate(full=True) is None
    for back in (to_numpy(column), to_numpy(pa.chunked_array([column, column]))[:count], to_numpy(column[:])):
        assert back.dtype == dtype
        assert np.array_equal(back, values)
    assert np.array_equal(to_numpy(column[1:]), values[1:])


def test_not_a_number_is_no_null_and_null_is_no_number() -> None:
    assert to_arrow(np.array([1.0, np.nan])).null_count == 0
    with pytest.raises(ValueError, match="1 values are null"):
        to_numpy(pa.array([1, None]))


def test_pandas_is_not_imported() -> None:
    code = "import numpy, sys; from lora_bench.files.arrow import *; to_numpy(to_arrow(numpy.arange(3)))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'pandas' not in sys.modules"], check=True, timeout=60)
