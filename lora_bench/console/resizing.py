"""A live display that leaves nothing behind when the terminal is resized.

A terminal that becomes narrower wraps the lines that are already there, so the display takes more rows than it was
drawn with. rich moves the cursor up by the rows of the drawing, and the others stay on the screen as ghosts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rich.control import Control
from rich.live import Live
from rich.live_render import LiveRender
from rich.segment import ControlType, Segment

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult

CUTTING_TERMINALS = ("XTERM_VERSION", "STY")
"""Environment variables of terminals that cut long lines when they are resized, in place of wrapping them: xterm and
screen."""
_REFRESHES_PER_SECOND = 8
_EMPTY_COLUMNS = 5


class ResizableLive(Live):
    """A live display that is drawn again and again, and removed when it is stopped.

    Args:
        console: the terminal.
        get_renderable: returns what is to be drawn.
    """

    def __init__(self, console: Console, get_renderable: Callable[[], RenderableType]) -> None:
        """Create the display; `start` draws it."""
        super().__init__(
            console=console,
            get_renderable=get_renderable,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
        )
        self._drawing = self._live_render = _Drawing(console, self.get_renderable())

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Return what the console prints in place of these lines: the old drawing erased, the lines, a new drawing."""
        if not self.console.is_interactive:
            return super().process_renderables(renderables)
        return [_Redrawn(self._drawing, [*renderables, self._drawing])]


class _Drawing(LiveRender):
    """A drawing that knows how many rows it takes in a terminal that was resized since."""

    def __init__(self, console: Console, renderable: RenderableType) -> None:
        super().__init__(renderable)
        self.console = console
        self.line_lengths: list[int] = []
        """Characters in each line of the drawing."""

    def restore_cursor(self) -> Control:
        """Return the control codes that erase the drawing after its last line break."""
        return _erase(_rows(self.line_lengths, self.console.width), below=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the segments of the drawing.

        The last columns stay empty: the terminal writes `^C` there, which must not wrap. A drawing that is higher than
        the terminal is cut, also the last one, because rows that have scrolled away cannot be erased.
        """
        self.vertical_overflow = "ellipsis"
        segments = [
            *super().__rich_console__(console, options.update_width(max(1, options.max_width - _EMPTY_COLUMNS)))
        ]
        lines = Segment.split_lines(segment for segment in segments if isinstance(segment, Segment))
        self.line_lengths = [Segment.get_line_length(line) for line in lines]
        yield from segments


class _Redrawn:
    """Lines and a new drawing in place of the old one, whose rows are counted last: just before all is written."""

    def __init__(self, drawing: _Drawing, renderables: list[ConsoleRenderable]) -> None:
        self.drawing = drawing
        self.renderables = renderables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        old_lengths = self.drawing.line_lengths
        segments = [segment for renderable in self.renderables for segment in console.render(renderable, options)]
        yield _erase(_rows(old_lengths, console.width))
        yield from segments


def _rows(line_lengths: list[int], width: int) -> int:
    """Return the rows that a drawing takes in a terminal of this width."""
    if any(name in os.environ for name in CUTTING_TERMINALS):
        return len(line_lengths)
    return sum(max(1, -(-length // width)) for length in line_lengths)


def _erase(rows: int, *, below: bool = False) -> Control:
    """Return the control codes that erase a drawing and move the cursor to its beginning.

    Args:
        rows: of the drawing; 0: there is none.
        below: the cursor is in the row below it, not at its end.
    """
    if rows == 0:
        return Control()
    erase_line = (ControlType.ERASE_IN_LINE, 2)
    upwards = ((ControlType.CURSOR_UP, 1), erase_line) * (rows if below else rows - 1)
    return Control(ControlType.CARRIAGE_RETURN, *(() if below else (erase_line,)), *upwards)
