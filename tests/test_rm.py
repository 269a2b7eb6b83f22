"""`lora-bench rm` removes runs and sweeps, nothing else, and none that is running."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from lora_bench.errors import Code
from lora_bench.records import folder_lock
from tests.command_line import files_below, lora_bench, refused
from tests.stored_runs import make_run, make_sweep


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_is_removed_with_its_empty_folders_and_others_stay(in_tmp: Path) -> None:
    make_run(Path("outputs/2026-01-01/one"), name="one")
    other = make_run(Path("outputs/two"), name="two")
    answer = lora_bench("rm", "one", "--yes")
    assert answer.code == 0, answer
    assert not Path("outputs/2026-01-01").exists()
    assert (other / "run.json").exists()


@pytest.mark.parametrize(
    ("answer", "stays"), [("y\n", False), ("YES\n", False), ("n\n", True), ("\n", True), ("", True)]
)
def test_a_terminal_is_asked(answer: str, stays: bool, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(Path("outputs/one"))
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert lora_bench("rm", "last").code == 0
    assert folder.exists() == stays


def test_without_a_terminal_nothing_is_removed_unless_yes_is_given(in_tmp: Path) -> None:
    make_run(Path("outputs/one"))
    before = files_below(in_tmp)
    assert refused("rm", "outputs/one").code == Code.MISSING
    assert lora_bench("rm", "outputs/one", "--dry-run").code == 0
    assert files_below(in_tmp) == before


def test_a_running_run_is_refused_and_a_killed_one_is_removed(in_tmp: Path) -> None:
    one, two = make_run(Path("outputs/one"), "running"), make_run(Path("outputs/two"), "running")
    claim = folder_lock.acquire(two)
    assert claim is not None
    assert refused("rm", "outputs/one", "outputs/two", "--yes").code == Code.IN_USE
    claim.release()
    assert "killed" in lora_bench("rm", "outputs/one", "--yes").out
    assert (one.exists(), two.exists()) == (False, True)


def test_files_of_others_stay(in_tmp: Path) -> None:
    make_run(in_tmp)
    (in_tmp / "thesis.txt").write_text("mine")
    answer = lora_bench("rm", str(in_tmp), "--yes")
    assert answer.code == 0
    assert "thesis.txt" in answer.err
    assert list(files_below(in_tmp).values()) == [b"mine"]


def test_a_sweep_is_removed_as_a_whole(in_tmp: Path) -> None:
    sweep = make_sweep(Path("outputs/sweeps/one"), 3, "name=grid", name="grid")
    (sweep / "table.md").write_text("")
    answer = lora_bench("rm", "grid", "--yes")
    assert answer.code == 0
    assert answer.out.splitlines()[-1].startswith("removed: 3 runs")
    assert not Path("outputs").exists()


def test_what_is_no_run_is_refused(in_tmp: Path) -> None:
    make_run(Path("outputs/one"), name="one")
    Path("empty").mkdir()
    Path("link").symlink_to("outputs/one")
    for folder, code in (("empty", Code.NOT_FOUND), ("outputs", Code.NOT_FOUND), ("link", Code.NOT_A_FILE)):
        assert refused("rm", "--yes", folder).code == code
    assert refused("rm", "--yes", "oone").code == Code.NOT_FOUND
    assert refused("rm").code == Code.INVALID_SYNTAX
