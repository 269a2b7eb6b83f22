"""Ctrl-C, SIGTERM and SIGHUP while a run trains: the loop stops at a point from which the run can be resumed."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_bench.console.signals import ENDING_SIGNALS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType


class Interruption:
    """Defers signals: within the context, the first one is only noted; a second Ctrl-C raises KeyboardInterrupt.

    A signal that was noted takes effect on leaving the context, unless an exception is raised.
    """

    def __init__(self) -> None:
        self.requested_signal: int | None = None
        """The signal that was noted, if any."""
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        """Install handlers that note SIGINT, SIGTERM and SIGHUP; ignored signals stay ignored.

        Outside the main thread no signal is deferred.
        """
        if threading.current_thread() is threading.main_thread():  # Python handles signals only in this thread
            for number in (signal.SIGINT, *ENDING_SIGNALS):
                if signal.getsignal(number) != signal.SIG_IGN:  # ignored by `nohup`, or in a script's background job
                    self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restore the earlier handlers, and raise the exception of a noted signal unless another one is on its way."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.requested_signal is not None and exc_type is None:
            self.raise_signal(self.requested_signal)

    @contextmanager
    def signals_act_at_once(self) -> Iterator[None]:
        """Let signals take effect at once within the context; one that was noted before is raised on entering it."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def raise_signal(self, number: int) -> None:
        """Raise KeyboardInterrupt for SIGINT, and SystemExit with 128 + the signal's number for another signal."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested_signal is not None:
            raise KeyboardInterrupt
        self.requested_signal = number
