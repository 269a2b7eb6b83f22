"""`lora-bench watch` shows the runs that train, and ends with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len
from rich.console import Console

from lora_bench import watch
from lora_bench.errors import Code
from lora_bench.records import folder_lock
from lora_bench.records.live_progress import LiveProgress, ProgressWriter
from lora_bench.records.run_folder import Run
from lora_bench.watch import Watch
from tests.command_line import lora_bench, refused
from tests.stored_runs import make_run, make_sweep

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def training(in_tmp: Path) -> Run:
    """A run that trains in this process, after a finished one and a killed one."""
    make_run(Path("outputs/done"))
    make_run(Path("outputs/killed"), "running")
    make_run(Path("outputs/one"), "running", name="first")
    run = Run.reopen(Path("outputs/one"))
    run.log({"step": 10, "epoch": 0.5, "split": "selection", "metrics": {"mcc": 0.25}, "seconds": 1})
    ProgressWriter(steps=200, steps_per_epoch=20).stepped(run, 11, 0.6931, 32)
    return run


def ticking(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
    """Let each sleep of the watch make the next action."""
    remaining = list(actions)
    monkeypatch.setattr(watch.time, "sleep", lambda _: remaining.pop(0)())


def test_lines_follow_a_run_to_its_end(training: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, lambda: None, lambda: make_run(Path("outputs/new")), lambda: training.finish("done"))
    answer = lora_bench("watch")
    assert answer.code == 0, answer
    first, new, end, summary = answer.out.splitlines()
    assert "first  running  step 11/200  epoch 0.55  loss 0.693  mcc 0.250" in first
    assert "done" in new
    assert "first  done" in end
    assert summary == "2 done below outputs"


def test_a_table_fits_the_terminal(training: Run) -> None:
    watched = Watch(Path("outputs"))
    watched.read()
    assert [run.run.folder.name for run in watched.runs] == ["one"]
    for width in (80, 40):
        table = watch._table(watched, Console(width=width, force_terminal=True), 10).plain.splitlines()
        assert max(map(cell_len, table[:2])) <= width
    wide = watch._table(watched, Console(width=200, force_terminal=True), 10).plain.splitlines()
    assert wide[0].split() == ["id", "name", "status", "step", "mcc", "loss", "epoch", "overrides"]
    assert wide[1].split()[-6:-1] == ["11/200", "0.250", "0.693", "0.55", "adapter.rank=8"]
    training.release()


def test_jobs_of_a_sweep_that_have_not_started_are_counted(in_tmp: Path) -> None:
    sweep = make_sweep(Path("outputs/sweep"), 3)
    (sweep / "2/run.json").unlink()
    claim = folder_lock.acquire(sweep)
    assert claim is not None
    watched = Watch(Path("outputs"))
    watched.read()
    assert (watched.is_running, watched.waiting) == (True, 1)
    claim.release()
    watched.read()
    assert not watched.is_running


def test_it_ends_where_nothing_runs_and_with_ctrl_c(training: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert lora_bench("watch").code == 0
    training.release()
    assert lora_bench("watch").out == "no run below outputs is running\n"


def test_wrong_folders_are_refused(in_tmp: Path) -> None:
    assert refused("watch").code == Code.NOT_FOUND
    assert refused("watch", "nobody").code == Code.NOT_FOUND


def test_damaged_progress_counts_as_none(in_tmp: Path) -> None:
    for content in ("", "[]", "{", '{"step": "a", "steps": 3}', '{"step": 1}'):
        Path("progress.json").write_text(content)
        assert LiveProgress.read(in_tmp) is None
    Path("progress.json").write_text('{"step": 1, "steps": 3, "loss": "NaN", "epoch": 0.5}')
    assert LiveProgress.read(in_tmp) == LiveProgress(1, 3, 0.5, None, None, None)
