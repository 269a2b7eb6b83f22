"""Progress of a sweep: a line for each job that ends, and how many are left, for how long, and the best one so far.

    with SweepProgress(console) as progress:
        progress.expect(["job 0: seed=0", "job 1: seed=1"], [1.0, 1.0])
        progress.job_ended("job 0: seed=0", JobResult("done", metric="mcc", score=0.42, seconds=38.0))

Launchers find the progress of the present sweep with `current`, as stages find their screen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from rich.progress import TextColumn

from lora_bench.console.format import format_duration
from lora_bench.console.progress import JobsDisplay
from lora_bench.console.stages import LINE_SECONDS, Live
from lora_bench.console.text import sanitise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType

    from rich.console import Console

MAX_LINE_SECONDS = 60.0
"""Without a terminal, the longest time from one line to the next in a long sweep."""
_LINE_SHARE = 0.07
"""Without a terminal, the time from one line to the next as a share of the time of the sweep so far."""
_MIN_SHARE = 0.01
"""Share of the work that has to be done before the remaining time is estimated."""

_current: SweepProgress | None = None


@dataclass(frozen=True)
class JobResult:
    """How a job of a sweep ended, from its record."""

    status: str
    metric: str = "mcc"
    """The main metric."""
    score: float | None = None
    """Its value on the selection split."""
    message: str = ""
    """Why it ended before its last step."""
    seconds: float | None = None
    pack_size: int = 1
    """Runs that took these seconds together."""
    task: str = ""
    """The data; scores of different data are not compared."""

    def line(self) -> str:
        """Return score and seconds in a few words; why it ended early in their place if it did."""
        if self.message:
            return self.message
        fields = [self.status if self.score is None else f"{self.metric} {self.score:.3f}"]
        if self.seconds is not None:
            shared = f" in a pack of {self.pack_size}" if self.pack_size > 1 else ""
            fields.append(f"{format_duration(self.seconds)}{shared}")
        return "  ".join(fields)


class SweepProgress(Live):
    """The progress of a sweep: a bar above those of its packs, or the beginning of each line without a terminal.

    Args:
        console: the terminal or file.
    """

    overview = True

    def __init__(self, console: Console) -> None:
        """Create the progress of a sweep without jobs."""
        columns = (TextColumn("{task.fields[state]}", markup=False), TextColumn("{task.fields[left]}", markup=False))
        super().__init__(console, None, columns[0], title="sweep", time_column=columns[1], state="", left="")
        self.titles: list[str] = []
        """The titles of all jobs known so far, in the order of their numbers."""
        self.later_jobs = 0
        """Number of jobs in later stages, whose titles are not known yet."""
        self.results: dict[str, JobResult | None] = {}
        """Results by the name of each job that has ended, such as `job 3`; None: it failed."""
        self._weights: dict[str, float] = {}
        self._later_weight = 0.0
        self._weight_before = 0.0
        self._training_began: float | None = None
        self.printed: set[str] = set()
        """Lines that `print_once` has printed."""

    def __enter__(self) -> Self:
        global _current
        _current = self
        return super().__enter__()

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _current
        _current = None
        super().__exit__(error_type, error, traceback)

    def expect(
        self, titles: Sequence[str], weights: Sequence[float], *, later_jobs: int = 0, later_weight: float = 0.0
    ) -> None:
        """Set the jobs of the sweep; ended ones stay ended.

        Args:
            titles: of all jobs known so far, by number.
            weights: the work of each in a common unit.
            later_jobs: jobs of later stages that are not among them.
            later_weight: the work of these.
        """
        self.titles, self.later_jobs, self._later_weight = [*titles], later_jobs, later_weight
        self._weights = {job_name(title): weight for title, weight in zip(titles, weights, strict=True)}
        self.refresh()

    def ended_before(self, title: str, result: JobResult | None) -> None:
        """Count a job that had ended before this command was started; nothing is printed."""
        name = job_name(title)
        self.results[name] = result
        self._weight_before += self._weights.get(name, 0.0)
        self.refresh()

    def job_ended(self, title: str, result: JobResult | None, error: Exception | None = None) -> None:
        """Count a job that has ended and print its line; a job that has been counted is ignored.

        Args:
            title: of the job.
            result: None: it has no record.
            error: what ended it early, if anything.
        """
        name = job_name(title)
        if name in self.results:
            return
        self.results[name] = result if error is None else None
        if error is not None:
            self.screen.print(f"{name} failed: {error}", style="red")
        elif result is not None:
            count = f"{len(self.results)}/{self.total_jobs}"
            self.screen.print(self._fitting(f"{count}  {title.rstrip(': ')}", result.line()))
        self.refresh()

    @property
    def total_jobs(self) -> int:
        """Number of jobs of all stages."""
        return len(self.titles) + self.later_jobs

    @property
    def line_seconds(self) -> float:
        """Without a terminal, the longest time from one line to the next, which grows with the time of the sweep."""
        return min(MAX_LINE_SECONDS, max(LINE_SECONDS, _LINE_SHARE * (time.monotonic() - self.began)))

    def line(self) -> str:
        """Return what has ended, the best job so far and the time left as one line."""
        return "  ".join(filter(None, [self._state(), self._left()]))

    def best(self) -> tuple[str, JobResult] | None:
        """Return name and result of the job with the best score; None without one, or if the jobs differ in data."""
        results = list(self.results.items())  # a thread draws while jobs end
        scored = [(name, result) for name, result in results if result and result.score is not None]
        if len({(result.task, result.metric) for _, result in scored}) != 1:
            return None
        return max(scored, key=lambda item: item[1].score or 0.0)

    def seconds_left(self) -> float | None:
        """Return an estimate of the time until the sweep ends; None while too little is done."""
        displays = [bar for bar in list(self.screen.bars) if isinstance(bar, JobsDisplay)]
        if displays and self._training_began is None:
            self._training_began = displays[0].began  # what was loaded before is loaded once
        done = sum(self._weights.get(name, 0.0) for name in list(self.results))
        done += sum(map(self._weight_done, displays))
        total = sum(self._weights.values()) + self._later_weight
        done_now = done - self._weight_before
        if done_now <= _MIN_SHARE * total:
            return None
        seconds = time.monotonic() - (self._training_began or self.began)
        return seconds * max(0.0, total - done) / done_now

    def _weight_done(self, display: JobsDisplay) -> float:
        """Return the work that is done of the jobs in a display."""
        names = {job_name(title) for title in display.names} - self.results.keys()
        return display.step / max(1, display.steps) * sum(self._weights.get(name, 0.0) for name in names)

    def _state(self) -> str:
        """Return how many jobs have ended and failed, and the best one so far."""
        failed = list(self.results.values()).count(None)
        fields = [f"{len(self.results)}/{self.total_jobs} jobs"]
        fields += [f"{failed} failed"] if failed else []
        if best := self.best():
            name, result = best
            fields.append(f"best {result.metric} {result.score:.3f} ({name})")
        return "  ".join(fields)

    def _left(self) -> str:
        """Return the time left in words; empty while it is unknown."""
        seconds = self.seconds_left()
        return "" if seconds is None else f"{format_duration(max(1.0, seconds))} left"

    def refresh(self) -> None:
        """Set the bar to what has ended and how long the rest takes."""
        self.progress.update(
            self.task,
            total=self.total_jobs or None,
            completed=len(self.results),
            state=self._state(),
            left=self._left(),
        )

    def _fitting(self, title: str, result: str) -> str:
        """Return the line of a job; in a terminal its title is cut so that the line fits."""
        width = max(map(len, self.titles), default=0) + len(f"{self.total_jobs}/{self.total_jobs}  ")
        if self.console.is_terminal:
            width = min(width, max(20, self.console.width - 1 - len(result) - 2))
        cut = title if len(title) <= width else f"{title[: width - 1]}…"
        return f"{cut:<{width}}  {result}"


def current() -> SweepProgress | None:
    """Return the progress of the sweep that runs in this process; None outside of a sweep."""
    return _current


def job_name(title: str) -> str:
    """Return the name of a job, `job 3`, from its title or that of one of its members: `job 3 member 0: seed=1`."""
    return " ".join(title.partition(":")[0].split()[:2])


def print_once(console: Console, lines: Iterable[str], prefix: str = "") -> None:
    """Print lines with a prefix; within a sweep only those that no job has printed before, whatever the prefix."""
    printed = set() if _current is None else _current.printed
    for line in lines:
        if line not in printed:
            printed.add(line)
            console.print(sanitise(f"{prefix}{line}"))
