"""Keeps the score of the suite: how many of the 48 cases pass, a case counting when all tests with its number did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

CASES = range(1, 49)


class Score:
    """Hooks of pytest: tests run in one process or in several, and the first counts what their reports say."""

    def __init__(self) -> None:
        self.passed: dict[int, list[bool]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: object
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        marker = item.get_closest_marker("reliability")
        if marker is not None:
            report.user_properties = [*report.user_properties, ("reliability", marker.args[0])]
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        number = dict(report.user_properties).get("reliability")
        if isinstance(number, int) and (report.failed or (report.passed and report.when == "call")):
            self.passed.setdefault(number, []).append(report.passed)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.passed:
            terminalreporter.write_line(tell(self.passed))


def tell(passed: Mapping[int, Sequence[bool]]) -> str:
    """One line: the score, and which cases are missing.

    Args:
        passed: for each number of a case, whether each of its tests passed; a skipped one is not among them.
    """
    missing = [number for number in CASES if not passed.get(number) or not all(passed[number])]
    score = f"reliability: {len(CASES) - len(missing)} of {len(CASES)}"
    return f"{score}; missing: {', '.join(map(str, missing))}" if missing else score
