"""What the whole suite shares: many runs in one process."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Every run collects garbage once; what was imported before need not be walked through each time."""
    gc.collect()
    gc.freeze()
