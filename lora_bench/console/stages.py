"""Progress of the stages of a command: bars in a terminal, elsewhere a line every few seconds.

    with show_progress(console), stage("tokenising train", total=len(texts), unit="pairs") as progress:
        progress.advance(8192)

A stage does not know where it is shown, as a logger does not know its handlers: without `show_progress` around it, it
shows nothing. This module imports nothing heavy.
"""

from __future__ import annotations

import gc
import threading
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lora_bench.console.format import format_duration, format_number
from lora_bench.console.resizing import ResizableLive
from lora_bench.console.text import sanitise, stdout_console

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from rich.progress import ProgressColumn

FIRST_LINE_SECONDS = 2.0
"""Without a terminal, a stage that takes longer gets a line."""
LINE_SECONDS = 4.0
"""Without a terminal, the longest time from one line to the next."""
_CHECK_SECONDS = 0.25
_BAR_AFTER_SECONDS = 0.3
"""Shorter stages get no bar, so that the terminal does not flicker."""

_current: Screen | None = None
"""The screen that stages are shown on."""


class Screen:
    """The bars of a console, one below the other; without a terminal, lines about the newest bar.

    A context manager: bars are removed from the terminal on exit, also after an error or Ctrl-C.

    Args:
        console: the terminal or file.
    """

    def __init__(self, console: Console) -> None:
        """Create the screen without bars."""
        self.console = console
        self.bars: list[Live] = []
        self._lock = threading.RLock()
        self._refreshed: ResizableLive | None = None
        self._ended = threading.Event()
        self._line_at = time.monotonic()

    def __enter__(self) -> Self:
        if not (self.console.is_terminal or self.console.quiet):
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove all bars; an exception is raised further."""
        self._ended.set()
        for bar in list(self.bars):
            self.remove(bar)

    def add(self, bar: Live) -> None:
        """Show a bar below the others; without a terminal, lines are about it until it is removed."""
        with self._lock:
            self.bars.append(bar)
            if self._refreshed is None and self.console.is_terminal and not self.console.quiet:
                # Each time a new one: one that is started again erases lines above it.
                self._refreshed = ResizableLive(self.console, self._all)
                self._refreshed.start()

    def remove(self, bar: Live) -> None:
        """Remove a bar, which may have been removed already."""
        with self._lock:
            if self.bars == [bar] and self._refreshed is not None:
                self._refreshed.stop()
                self._refreshed = None
            if bar in self.bars:
                self.bars.remove(bar)

    def print(self, line: str, style: str = "") -> None:
        """Print a line of progress; the next one about a bar follows after its `line_seconds` at the latest."""
        self._line_at = time.monotonic()
        self.console.print(sanitise(line, style))

    def _all(self) -> Group:
        """Return the bars that have been there for a moment."""
        with self._lock:
            bars = [bar for bar in self.bars if time.monotonic() - bar.began >= bar.shown_after_seconds]
            for bar in bars:
                bar.refresh()
        return Group(*(renderable for bar in bars for renderable in bar.progress.get_renderables()))

    def _print_lines(self) -> None:
        """Print a line about the newest bar whenever one is due, until the screen is left.

        The line begins with that of each bar that is an `overview`.
        """
        while not self._ended.wait(_CHECK_SECONDS):
            with self._lock:
                bar = self.bars[-1] if self.bars else None
                now = time.monotonic()
                silence = now - self._line_at
                if bar is None or silence < FIRST_LINE_SECONDS:
                    continue
                interval = max(shown.line_seconds for shown in self.bars)
                is_new = not bar.has_line and now - bar.began >= FIRST_LINE_SECONDS and interval == LINE_SECONDS
                if is_new or silence >= interval:
                    bar.has_line = True
                    overviews = [shown for shown in self.bars[:-1] if shown.overview]
                    self.print("  ".join(shown.line() for shown in [*overviews, bar]))


class Live(ABC):
    """A progress bar in a terminal; without a terminal, `due` tells when to print a line instead.

    A context manager; the bar is removed on exit.

    Args:
        console: the terminal.
        total: number of steps; None if it is unknown.
        columns: shown after the bar.
        title: shown before the bar.
        time_column: the last one; None: the time that remains, or with an unknown total the time so far.
        fields: initial values of the fields that the columns show.
    """

    shown_after_seconds = 0.0
    lines_per_run = 10
    """Maximum number of times that `due` is true."""
    overview = False
    """Without a terminal, its line begins the lines about the bars that were added after it."""

    def __init__(
        self,
        console: Console,
        total: float | None,
        *columns: ProgressColumn,
        title: str = "",
        time_column: ProgressColumn | None = None,
        **fields: Any,
    ) -> None:
        """Create the bar; it is shown on entering the context."""
        self.console = console
        self.total = total
        self.began = time.monotonic()
        self.has_line = False
        """A line about it was printed because nothing else was."""
        self.screen = Screen(console)
        remaining = time_column or (TimeElapsedColumn() if total is None else TimeRemainingColumn(compact=True))
        titles = [TextColumn(sanitise(title).plain, markup=False)] if title else []
        self.progress = Progress(
            *titles, BarColumn(bar_width=None), *columns, remaining, console=console, expand=True, transient=True
        )
        self.task = self.progress.add_task("", total=total, **fields)
        self._context = ExitStack()

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        self.screen = self._context.enter_context(show_progress(self.console))
        self.screen.add(self)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove the bar; an exception is raised further."""
        self.screen.remove(self)
        self._context.close()

    @property
    def line_seconds(self) -> float:
        """Without a terminal, the longest time from one line to the next while it is shown."""
        return LINE_SECONDS

    def due(self, done: int) -> bool:
        """Return whether a line is to be printed after this many steps.

        Never in a terminal; otherwise after equal intervals, about `lines_per_run` times in all.
        """
        return not self.console.is_terminal and done % -(-int(self.total or 1) // self.lines_per_run) == 0

    def refresh(self) -> None:
        """Bring the bar up to date before it is drawn; most bars are at each event."""

    @abstractmethod
    def line(self) -> str:
        """Return the progress as one line, which is printed if nothing else was for a while."""


class Stage(Live):
    """A part of a command that takes time, and how much of it is done."""

    shown_after_seconds = _BAR_AFTER_SECONDS

    def __init__(self, console: Console, name: str, total: float | None, unit: str, done: float = 0) -> None:
        """Create the stage; `unit` is the plural of what is counted, or `B` for bytes."""
        state = TextColumn("{task.fields[state]}", markup=False)
        super().__init__(console, total, state, title=name, state="")
        self.name, self.unit = name, unit
        self.done = self.done_before = done

    def advance(self, number: float = 1) -> None:
        """Count more of it as done; this is cheap."""
        self.done += number
        self.progress.update(self.task, completed=self.done, state=self.state())

    def state(self) -> str:
        """Return what is done and how fast; empty if nothing is counted."""
        if not self.unit:
            return ""
        rate = (self.done - self.done_before) / max(time.monotonic() - self.began, 1e-9)
        if self.unit == "B":
            total = "" if self.total is None else f"/{format_number(self.total, 'B')}"
            return f"{format_number(self.done, 'B')}{total}  {format_number(rate, 'B')}/s"
        total = "" if self.total is None else f"/{self.total:,.0f}"
        speed = f"  {rate:,.0f} {self.unit}/s" if rate >= 10 else f"  {rate:.2g} {self.unit}/s" if rate else ""
        return f"{self.done:,.0f}{total} {self.unit}{speed}"

    def line(self) -> str:
        """Return name and state; the seconds so far if nothing is counted."""
        return f"{self.name}  {self.state() or format_duration(time.monotonic() - self.began)}"


@contextmanager
def stage(name: str, total: float | None = None, unit: str = "", *, done: float = 0) -> Iterator[Stage]:
    """Show a stage on the current screen while the context lasts; nothing is shown if there is none.

    Args:
        name: what is being done, such as `tokenising train`.
        total: how much there is to do; None if it is unknown.
        unit: the plural of what is counted, such as `pairs`; `B` for bytes; empty if nothing is counted.
        done: how much was done before, which does not count in the rate.
    """
    if _current is None:
        yield Stage(_NOWHERE, name, total, unit, done)
        return
    with Stage(_current.console, name, total, unit, done) as current:
        yield current


@contextmanager
def importing_libraries() -> Iterator[Stage]:
    """Show that torch and transformers are imported, which takes seconds.

    The garbage collector is paused, and what was imported is exempted from it afterwards: it would search a growing
    heap again and again, in which nothing is garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with stage("importing torch and transformers") as current:
            yield current
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def current_console() -> Console:
    """Return the console that progress is shown on at present; without one, a new console for standard output."""
    return stdout_console() if _current is None else _current.console


@contextmanager
def show_progress(console: Console) -> Iterator[Screen]:
    """Show the stages of this process on a console while the context lasts.

    Where that console has a screen already, it is used.
    """
    global _current
    if _current is not None and _current.console is console:
        yield _current
        return
    before = _current
    with Screen(console) as screen:
        _current = screen
        try:
            yield screen
        finally:
            _current = before


_NOWHERE = Console(quiet=True)
