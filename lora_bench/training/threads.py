"""The number of threads of a run on a CPU: as many as there are processors that nobody else uses.

The threads of a product wait for one another by spinning. With more threads than free processors a thread waits for one
that is not running, at every operator again: on two processors beside one busy process a step took thirty times as long
as with one thread (LOG.md).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STAT = Path("/proc/stat")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
WINDOW_SECONDS = 10.0
"""Time over which the load of a training is measured."""
SHORTEST_SECONDS = 0.3
"""The shortest time whose load says something: the system counts in hundredths of a second."""
BUSY_PROCESSORS = 0.5
"""Others that use less than this are not worth a thread."""


@dataclass(frozen=True)
class Load:
    """Processor seconds since the system started."""

    busy: float
    """Of all processes."""
    of_this_process: float
    """Of this process and those that it has started and that have ended."""
    wall: float

    @classmethod
    def now(cls) -> Load | None:
        """Return the load of this moment; None where the system has no `/proc/stat`."""
        with suppress(OSError, ValueError, IndexError):
            user, nice, system, _, _, irq, softirq, steal = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:9])
            ticks = user + nice + system + irq + softirq + steal
            return cls(ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), time.monotonic())
        return None

    def others_since(self, earlier: Load) -> float:
        """Return the number of processors that other processes have used on average since an earlier moment."""
        seconds = self.wall - earlier.wall
        of_this_process = self.of_this_process - earlier.of_this_process
        return max(0.0, self.busy - earlier.busy - of_this_process) / seconds if seconds > 0 else 0.0


def usable_processors() -> int:
    """Return the number of processors that this process may use, by its affinity and its container's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = map(int, _QUOTA.read_text().split())  # not a number without a quota
        return max(1, min(affinity, quota // period))
    return affinity


def fit_threads(earlier: Load | None) -> str | None:
    """Let torch use no more threads than there are processors that others leave free, and at least one.

    It never uses more than before (`OMP_NUM_THREADS`, or all processors).

    Args:
        earlier: a moment at least `SHORTEST_SECONDS` ago; the load since then counts. None: the load is not known.

    Returns:
        A note if there are fewer threads now.
    """
    now, before, usable = Load.now(), torch.get_num_threads(), usable_processors()
    is_known = now is not None and earlier is not None and now.wall - earlier.wall >= SHORTEST_SECONDS
    others = now.others_since(earlier) if is_known else 0.0  # type: ignore[union-attr, arg-type]
    free = usable - round(others) if others >= BUSY_PROCESSORS else usable
    threads = max(1, min(before, free))
    if threads == before:
        return None
    torch.set_num_threads(threads)
    if others < BUSY_PROCESSORS:
        return f"{threads} of {before} threads are used: this process may use no more processors."
    return (
        f"{threads} of {before} threads are used: other programs keep {others:.1f} of {usable} processors busy. "
        f"trainer.threads={before} uses all."
    )


class StarvationWatch:
    """Notices that other programs take the processors that the threads of a training need.

    Its threads stay as they are, because results depend on their number in the last digits.
    """

    def __init__(self) -> None:
        self._earlier = Load.now()
        self._has_reported = False

    def update(self) -> str | None:
        """Return a note, once, if the threads starved for `WINDOW_SECONDS`; otherwise None."""
        threads = torch.get_num_threads()
        if self._has_reported or threads == 1 or self._earlier is None:
            return None
        if time.monotonic() - self._earlier.wall < WINDOW_SECONDS:  # reading a load costs at every step
            return None
        now, usable = Load.now(), usable_processors()
        if now is None:
            return None
        others = now.others_since(self._earlier)
        self._earlier = now
        if others < BUSY_PROCESSORS or usable - others > threads - BUSY_PROCESSORS:
            return None
        self._has_reported = True
        fewer = max(1, usable - round(others))
        return (
            f"{threads} threads wait for one another: other programs keep {others:.1f} of {usable} "
            f"processors busy. Stop with Ctrl-C and resume with OMP_NUM_THREADS={fewer} set to train faster."
        )
