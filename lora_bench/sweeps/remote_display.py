"""The progress of training in another process, shown on the screen of the sweep's process.

The training process has a `SentDisplay`, which sends each update as a message: a name and plain arguments. The sweep's
process passes the messages to a `ReceivedDisplay`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

from lora_bench.console.progress import JobsDisplay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from rich.console import Console

    from lora_bench.console.stages import Screen


class SentDisplay(JobsDisplay):
    """A progress display that shows nothing and sends its updates.

    Args:
        send: takes the name of a message and its arguments, which JSON can represent.
        console: unused.
        steps: optimizer updates.
        names: titles of the members.
        every_seconds: the least time between two messages about steps.
    """

    def __init__(
        self,
        send: Callable[..., None],
        console: Console,
        steps: int,
        names: Sequence[str],
        every_seconds: float = 0.1,
    ) -> None:
        super().__init__(console, steps, names)
        self.send = send
        self.every_seconds = every_seconds
        self._next_at = 0.0
        send("show", steps, list(names))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.send("hide")

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        """Send the smoothed state after a step, if the last one was not just sent."""
        super().stepped(step, losses, pairs)
        now = time.monotonic()
        if now >= self._next_at or step == self.steps:
            self._next_at = now + self.every_seconds
            smoothed = [[member, self.losses[member]] for member in losses]
            self.send("stepped", step, smoothed, self.pairs_per_second)

    def evaluated(self, member: int, line: dict[str, Any], metric: str) -> None:
        super().evaluated(member, line, metric)
        self.send("evaluated", member, line, metric)


class ReceivedDisplay:
    """A display on this process's screen of what another process trains.

    Args:
        screen: of the sweep.
    """

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.display: JobsDisplay | None = None
        """The present training, if there is one."""

    def receive(self, message: str, *arguments: Any) -> None:
        """Show a message of `SentDisplay`."""
        if message == "show":
            self.hide()
            self.display = JobsDisplay(self.screen.console, *arguments)
            self.screen.add(self.display)
        elif message == "hide":
            self.hide()
        elif self.display is not None and message == "stepped":
            step, losses, rate = arguments
            self.display.set_state(step, dict(losses), rate)
        elif self.display is not None and message == "evaluated":
            self.display.evaluated(*arguments)

    def hide(self) -> None:
        """Remove the display, if there is one."""
        if self.display is not None:
            self.screen.remove(self.display)
            self.display = None
