"""A sweep prints a line for each job that ends, and says how much is left; a terminal has a bar above the packs'."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from lora_bench.console import stages, sweep_progress
from lora_bench.console.progress import JobsDisplay
from lora_bench.console.sweep_progress import JobResult, SweepProgress, print_once
from tests.console.test_progress import ESCAPE
from tests.console.test_stages import wait_for

TITLES = [f"job {number}: adapter.rank={rank}" for number, rank in enumerate((2, 4, 8, 16))]


def done(score: float, **settings: object) -> JobResult:
    return JobResult("done", score=score, seconds=38.2, **settings)  # type: ignore[arg-type]


def test_a_line_for_each_job_says_count_overrides_score_and_seconds() -> None:
    file = io.StringIO()
    with SweepProgress(Console(file=file)) as progress:
        progress.expect(TITLES, [1.0] * 4, later_jobs=2, later_weight=2.0)
        progress.job_ended(TITLES[1], done(0.41))
        progress.job_ended(TITLES[0], done(0.52, pack_size=3))
        progress.job_ended(TITLES[0], done(0.99))  # it has been counted
        progress.job_ended(TITLES[2], None, ValueError("a cable"))
        progress.job_ended(TITLES[3], JobResult("eliminated", message="eliminated at step 5"))
        state = progress.line()
    assert file.getvalue().splitlines() == [
        "1/6  job 1: adapter.rank=4   mcc 0.410  38 s",
        "2/6  job 0: adapter.rank=2   mcc 0.520  38 s in a pack of 3",
        "job 2 failed: a cable",
        "4/6  job 3: adapter.rank=16  eliminated at step 5",
    ]
    assert state.startswith("4/6 jobs  1 failed  best mcc 0.520 (job 0)  ")
    assert sweep_progress.current() is None


def test_scores_of_different_data_have_no_best() -> None:
    with SweepProgress(Console(file=io.StringIO())) as progress:
        progress.expect(TITLES[:2], [1.0] * 2)
        progress.job_ended(TITLES[0], done(0.5, task="qqp"))
        assert progress.best() is not None
        progress.job_ended(TITLES[1], done(0.6, task="mrpc"))
        assert progress.best() is None


def test_the_time_left_counts_the_work_of_running_and_later_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    members = [f"job 2 member {member}: adapter.rank=8" for member in range(2)]
    with SweepProgress(console := Console(file=io.StringIO())) as progress:
        progress.expect(TITLES, [1.0, 1.0, 4.0, 4.0], later_jobs=1, later_weight=10.0)
        progress.ended_before(TITLES[0], done(0.5))
        assert progress.seconds_left() is None
        clock[0] += 500  # what is loaded before the first training is loaded once
        with JobsDisplay(console, 100, members) as display:
            assert progress.seconds_left() is None
            progress.job_ended(TITLES[1], done(0.5))
            display.stepped(50, {0: 0.5, 1: 0.5}, 32)
            clock[0] += 30
            assert progress.seconds_left() == pytest.approx(30 * 16 / 3)  # 3 of 19 are done by this command
        progress.job_ended(TITLES[2], done(0.5))
        assert progress.seconds_left() == pytest.approx(30 * 14 / 5)


def test_lines_of_a_pack_follow_the_state_of_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("FIRST_LINE_SECONDS", 0.05), ("LINE_SECONDS", 0.1), ("_CHECK_SECONDS", 0.01)):
        monkeypatch.setattr(stages, name, seconds)
    monkeypatch.setattr(sweep_progress, "LINE_SECONDS", 0.1)
    file = io.StringIO()
    console = Console(file=file, width=200)
    with SweepProgress(console) as progress:
        progress.expect(TITLES, [1.0] * 4)
        with JobsDisplay(console, 10, TITLES[:1]) as display:
            display.stepped(5, {0: 0.5}, 32)
            display.evaluated(
                0, {"split": "selection", "epoch": 1.0, "metrics": {"accuracy": 0.5, "f1": 0.5, "mcc": 0.1}}, "mcc"
            )
            (line, *_) = wait_for(file, "step 5/10")
    assert re.fullmatch(r"0/4 jobs  .* left  job 0: step 5/10  loss 0\.500  \d+ pairs/s", line)


def test_lines_become_rarer_in_a_long_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = SweepProgress(Console(file=io.StringIO()))
    seconds = {}
    for minutes in (0, 10, 600):
        monkeypatch.setattr(time, "monotonic", lambda now=progress.began + 60 * minutes: now)
        seconds[minutes] = progress.line_seconds
    assert seconds[0] == stages.LINE_SECONDS < seconds[10] < seconds[600] == sweep_progress.MAX_LINE_SECONDS


def test_what_every_job_prints_is_printed_once_in_a_sweep() -> None:
    file = io.StringIO()
    console = Console(file=file)
    with SweepProgress(console):
        for worker in range(2):
            print_once(console, ["toy: train 40", f"job {worker}"], f"worker {worker}: ")
    print_once(console, ["toy: train 40"])
    assert file.getvalue().splitlines() == [
        "worker 0: toy: train 40",
        "worker 0: job 0",
        "worker 1: job 1",
        "toy: train 40",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_is_never_overrun(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width)
    title = f"job 0: {' '.join(f'adapter.some_key_{number}=12345' for number in range(5))}"
    with SweepProgress(console) as progress:
        progress.expect([title, TITLES[1]], [1.0, 1.0])
        with JobsDisplay(console, 10, [title]) as display:
            display.stepped(5, {0: 0.5}, 32)
        progress.job_ended(title, done(0.5))
        progress.job_ended(TITLES[1], done(0.5))
    seen = ESCAPE.sub("", file.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, seen)) <= width
    ended = [line.rstrip() for line in seen if line.startswith(("1/2", "2/2"))]
    assert all(line.endswith("mcc 0.500  38 s") for line in ended), ended
    assert len(ended) == 2
