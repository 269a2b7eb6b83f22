"""The score counts a case when all its tests passed, and every case has a test that is named by its number."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.reliability.score import CASES, tell


def marked() -> dict[str, set[int]]:
    """Each test function of the suite, and the cases that its marks name."""
    cases_by_test: dict[str, set[int]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = [
                    mark for mark in node.decorator_list if ast.unparse(mark).startswith("pytest.mark.reliability")
                ]
                cases_by_test[node.name] = {
                    ast.literal_eval(mark.args[0]) for mark in marks if isinstance(mark, ast.Call)
                }
    return cases_by_test


def test_a_case_counts_when_all_its_tests_passed() -> None:
    everything = {number: [True] for number in CASES}
    assert tell(everything) == "reliability: 48 of 48"
    assert tell({**everything, 7: [True, False]}) == "reliability: 47 of 48; missing: 7"
    assert tell({1: [True, True], 2: []}).startswith("reliability: 1 of 48; missing: 2, 3, 4")


def test_every_test_is_named_by_its_case() -> None:
    for name, numbers in marked().items():
        assert all(name.startswith(f"test_{number:02d}_") for number in numbers), name
        assert len(numbers) == (1 if name[5:7].isdigit() else 0), name


def test_every_case_has_a_test() -> None:
    assert set().union(*marked().values()) == set(CASES)
