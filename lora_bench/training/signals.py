"""Ctrl-C, SIGTERM and SIGHUP while a run trains: they ask for a stop, and the loop stops where it can go on from."""

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
    """Within, the first signal is only noted; a second Ctrl-C ends the process at once, as it always does."""

    def __init__(self) -> None:
        self.requested_signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only there Python can handle signals
            for number in (signal.SIGINT, *ENDING_SIGNALS):
                if signal.getsignal(number) != signal.SIG_IGN:  # by `nohup`, or a script that runs it in the background
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self.requested_signal is not None and kind is None:
            self.raise_signal(self.requested_signal)

    @contextmanager
    def signals_act_at_once(self) -> Iterator[None]:
        """Within, a signal acts at once, as it does outside; so does one that was noted before."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def raise_signal(self, number: int) -> None:
        """End the run as this signal asks for: KeyboardInterrupt, or SystemExit with 128 and the signal's number."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested_signal is not None:
            raise KeyboardInterrupt
        self.requested_signal = number
