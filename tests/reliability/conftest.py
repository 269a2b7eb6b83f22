"""Keeps the score of the suite: `reliability: N of 48`, a case counting when all tests with its number passed."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from tests.reliability.score import tell

if TYPE_CHECKING:
    from collections.abc import Generator

_PASSED = pytest.StashKey[dict[int, list[bool]]]()


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Every run collects garbage once; what was imported before need not be walked through each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: object) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    marker = item.get_closest_marker("reliability")
    if marker is not None and (report.failed or (report.passed and report.when == "call")):
        item.config.stash.setdefault(_PASSED, {}).setdefault(marker.args[0], []).append(report.passed)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    passed = config.stash.get(_PASSED, {})
    if passed:
        terminalreporter.write_line(tell(passed))
