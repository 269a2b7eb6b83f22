"""Stages show a line every few seconds without a terminal, and a bar that leaves no trace in one."""

from __future__ import annotations

import gc
import io
import sys
import time

import huggingface_hub.utils.tqdm  # noqa: F401
import pytest
from rich.console import Console

from lora_bench.console import stages
from lora_bench.console.stages import importing_libraries, show_progress, stage
from lora_bench.files import hub


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundredths of seconds in place of seconds."""
    for name, seconds in (("FIRST_LINE_SECONDS", 0.05), ("LINE_SECONDS", 0.1), ("_CHECK_SECONDS", 0.01)):
        monkeypatch.setattr(stages, name, seconds)


def wait_for(file: io.StringIO, text: str) -> list[str]:
    """Wait until a text was printed, at most 10 seconds, and return all lines."""
    until = time.monotonic() + 10
    while text not in file.getvalue() and time.monotonic() < until:
        time.sleep(0.01)
    return file.getvalue().splitlines()


@pytest.mark.usefixtures("soon")
def test_without_a_terminal_a_long_stage_prints_lines() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file)):
        with stage("tokenising", total=4000, unit="pairs") as progress:
            progress.advance(1500)
            lines = wait_for(file, "tokenising")
        assert lines[0].startswith("tokenising  1,500/4,000 pairs  ")
        assert lines[0].endswith(" pairs/s")
        with stage("loading the model"):
            assert wait_for(file, "loading")[-1].startswith("loading the model  0.")


@pytest.mark.usefixtures("soon")
def test_lines_are_about_the_innermost_stage() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file)), stage("outer"), stage("inner"):
        lines = wait_for(file, "inner")
    assert not any(line.startswith("outer") for line in lines)


def test_a_short_stage_prints_nothing() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file)), stage("short", total=1) as progress:
        progress.advance()
    assert file.getvalue() == ""


def test_a_stage_outside_of_a_command_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with stage("scoring", total=2, unit="pairs") as progress:
        progress.advance()
    assert capfd.readouterr() == ("", "")


def test_a_terminal_is_left_clean_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(stages.Stage, "shown_after_seconds", 0.0)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)

    def stopped() -> None:
        with show_progress(console), stage("scoring", total=9, unit="pairs") as progress:
            progress.advance(3)
            with stage("inner"):
                console.print("a line above the bars")
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    text = file.getvalue()
    assert "3/9 pairs" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    assert text.endswith("\x1b[2K")  # the last thing is an erased line


@pytest.mark.usefixtures("soon")
def test_downloads_of_the_hubs_libraries_are_stages() -> None:
    file = io.StringIO()
    module = sys.modules["huggingface_hub.utils.tqdm"]
    before = module.tqdm
    settings = {"total": 500_000_000, "initial": 100_000_000, "unit": "B", "desc": "model.safetensors"}
    with show_progress(Console(file=file)), hub.shown_progress(), module.tqdm(**settings) as bar:
        bar.update(150_000_000)
        lines = wait_for(file, "downloading")
    assert lines[0].startswith("downloading model.safetensors  250 MB/500 MB  ")
    assert module.tqdm is before


def test_the_garbage_collector_rests_while_libraries_are_imported() -> None:
    assert gc.isenabled()
    with importing_libraries():
        assert not gc.isenabled()
    assert gc.isenabled()
