"""Regular expressions that a user or a foreign file gives: matching one may take for ever, so its time is limited.

A few nested repetitions (`(a+)+`) take longer than any run on a name that does not match. Python's `re` looks for
signals while it matches, so a timer ends it. Timers belong to a process's main thread: elsewhere there is no limit.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_bench.errors import Code, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MATCH_SECONDS = 5.0
"""Far more than any sensible expression needs for all names of a network: milliseconds."""


class _TimeIsUpError(Exception):
    pass


@contextmanager
def limited_matching(key: str, value: object = None, *, file: Path | None = None) -> Iterator[None]:
    """Limit the time that compiling and matching expressions takes within the context to `MATCH_SECONDS`, 5 s.

    The limit is a timer signal, so there is none outside the main thread, or on a system without such timers. An
    earlier handler of SIGALRM is put back at the end; a timer that was running is not.

    Args:
        key, value, file: what gives the expressions, for the message.

    Raises:
        UserError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(*_: object) -> None:
        raise _TimeIsUpError

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, MATCH_SECONDS)
    try:
        yield
    except _TimeIsUpError:
        reason = f"takes more than {MATCH_SECONDS:g} seconds to match against the names of the network's modules"
        remedy = "Give a simpler expression: repeat no group that repeats something itself."
        raise UserError(reason, key=key, value=value, file=file, remedy=remedy, code=Code.INVALID_VALUE) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
