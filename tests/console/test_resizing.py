"""A display leaves nothing behind in a terminal that is resized while it is shown."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from lora_bench.console.resizing import CUTTING_TERMINALS, ResizableLive


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> ResizableLive:
    """A display of two lines with 39 and 10 characters, drawn in a terminal of 44 columns."""
    for name in CUTTING_TERMINALS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), force_terminal=True, width=44, height=20)
    display = ResizableLive(console, lambda: Text("a" * 39 + "\n" + "b" * 10))
    console.print(display._drawing)
    return display


@pytest.mark.parametrize(("width", "rows"), [(100, 2), (44, 2), (39, 2), (38, 3), (13, 4), (9, 7)])
def test_rows_are_those_of_the_wrapped_lines(live: ResizableLive, width: int, rows: int) -> None:
    live.console.width = width
    assert str(live._drawing.restore_cursor()).count("\x1b[1A") == rows
    (redrawn,) = live.process_renderables([])
    erased, *_ = live.console.render(redrawn)
    assert erased.text.count("\x1b[1A") == rows - 1


def test_a_terminal_that_cuts_lines_keeps_its_rows(live: ResizableLive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTERM_VERSION", "XTerm(390)")
    live.console.width = 20
    assert str(live._drawing.restore_cursor()).count("\x1b[1A") == 2


def test_a_display_higher_than_the_terminal_is_cut_so_that_it_can_be_erased(live: ResizableLive) -> None:
    live._drawing.vertical_overflow = "visible"  # as rich sets it for the last drawing
    live._drawing.set_renderable(Text("\n".join("row" for _ in range(30))))
    live.console.print(live._drawing)
    assert str(live._drawing.restore_cursor()).count("\x1b[1A") == live.console.height == 20


SHOWN = """
import time
from rich.console import Console
from rich.text import Text
from lora_bench.console.resizing import ResizableLive

console = Console(highlight=False)
for _ in range(9):  # tmux moves rows above the cursor's into the history, where nothing can be erased
    console.print("above")
live = ResizableLive(console, lambda: Text("x" * (console.width - 5) + "\\n" + "y" * (console.width - 5)))
live.auto_refresh = False
live.start()
live.refresh()
for columns in (70, 100, 45):
    while console.width != columns:
        time.sleep(0.01)
    live.refresh()
    console.print(f"between {columns}")
live.stop()
console.print("below")
time.sleep(30)
"""
"""A display of two rows that is drawn whenever the terminal has a new width."""


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_a_resized_terminal_shows_no_ghosts(tmp_path: Path) -> None:
    Path(tmp_path, "shown.py").write_text(SHOWN)
    tmux = ["tmux", "-L", f"lora-bench-{time.monotonic_ns()}"]
    command = f"PYTHONPATH={Path(__file__).parents[2]} {sys.executable} {tmp_path}/shown.py"

    def screen() -> list[str]:
        output = subprocess.run([*tmux, "capture-pane", "-p", "-S", "-100"], capture_output=True, text=True, check=True)
        return [line for line in output.stdout.splitlines() if line.strip()]

    def wait_for(line: str) -> None:
        until = time.monotonic() + 20
        while line not in screen() and time.monotonic() < until:
            time.sleep(0.02)

    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}  # of readline
    start = [*tmux, "-f", "/dev/null", "new-session", "-d", "-x", "110", "-y", "20", command]
    subprocess.run(start, check=True, env=environment)
    try:
        for before, columns in pairwise((110, 70, 100, 45)):
            wait_for("y" * (before - 5))
            subprocess.run([*tmux, "resize-window", "-x", str(columns)], check=True)
        wait_for("below")
        assert screen() == [*["above"] * 9, "between 70", "between 100", "between 45", "below"]
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
