"""`lora-bench watch`: a live table of the runs below a folder that train; without a terminal a line now and then."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lora_bench.console.arguments import CommandParser
from lora_bench.console.columns import TextColumn, available_width, lay_out
from lora_bench.console.format import format_duration
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError
from lora_bench.records import folder_lock, metrics_log, run_folder, sweep_folder
from lora_bench.records.live_progress import LiveProgress
from lora_bench.records.run_folder import METRICS_FILE, RECORD_FILE
from lora_bench.records.run_names import TOP, find_folder, sweep_of
from lora_bench.records.stored_run import StoredRun, differing_overrides

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

READ_SECONDS = 2.0
"""Time from one reading of the records to the next."""
RESIZE_SECONDS = 0.2
"""Time in which a changed size of the terminal is noticed."""
LINE_SECONDS = 30.0
"""Without a terminal, time from one line about a run to the next."""


def main(arguments: list[str]) -> int:
    """Run the command until no run below the folder trains any more, or until Ctrl-C; return 0.

    Raises:
        UserError: an argument is wrong, or the folder does not exist.
    """
    options = _parser().parse_args(arguments)
    folder = TOP if options.folder is None else find_folder(options.folder, "watch")
    if not folder.is_dir():
        remedy = "`lora-bench train` makes it; watch a run once it has started."
        raise UserError("there is no such folder", key="watch", value=folder, remedy=remedy, code=Code.NOT_FOUND)
    watch = Watch(folder)
    watch.read()
    console = Console(highlight=False)
    if not watch.is_running:
        console.print(sanitise(f"no run below {folder} is running"))
        return 0
    try:
        (_show_table if console.is_terminal else _print_lines)(watch, console)
    except KeyboardInterrupt:
        return 0
    return 0


# -- what is running --


@dataclass(frozen=True)
class WatchedRun:
    """A run that trains, or that has ended since it was first seen."""

    run: StoredRun
    progress: LiveProgress | None
    """None before the first step, and after the end."""
    score: float | None
    """The main metric on the reported split, or before the end at the last evaluation on the selection split."""

    @classmethod
    def of(cls, run: StoredRun) -> WatchedRun:
        """Read the progress of a run."""
        if run.score is not None:
            return cls(run, None, run.score[1])
        last = metrics_log.last_value(run.folder / METRICS_FILE, run.main_metric)
        return cls(run, LiveProgress.read(run.folder), last[0] if last else None)

    @property
    def line(self) -> str:
        """The run in one line of text."""
        parts = [self.run.id, self.run.name or "", self.run.state]
        parts += [self.progress.line] if self.progress else []
        parts += [] if self.score is None else [f"{self.run.main_metric} {self.score:.3f}"]
        return "  ".join(filter(None, parts))


class Watch:
    """The runs below a folder that train, or have trained since the first reading, and all runs of running sweeps.

    Args:
        folder: it may hold any number of runs; a record is read again only if it was written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[WatchedRun] = []
        """In the order of their folders."""
        self.waiting = 0
        """Jobs of running sweeps that have not started."""
        self.is_running = True
        """True if a run or a sweep was running at the last reading."""
        self._records: dict[Path, tuple[int, dict[str, Any]]] = {}
        """Records with the time at which they were written."""
        self._seen: set[Path] = set()
        """Folders of runs that are shown, also after their end."""
        self._sweeps = {path.parent for path in folder.rglob(sweep_folder.SWEEP_FILE)}

    def read(self) -> None:
        """Read what has changed since the last time."""
        runs = self._read_runs()
        running = {run.folder for run in runs if run.state == "running"}
        self._sweeps |= {sweep for folder in running if (sweep := sweep_of(folder)) is not None}
        sweeps = {sweep for sweep in self._sweeps if folder_lock.is_locked(sweep)}
        self._seen |= running | {run.folder for run in runs if not sweeps.isdisjoint(run.folder.parents)}
        self.runs = [WatchedRun.of(run) for run in runs if run.folder in self._seen]
        self.waiting = sum(map(_count_waiting, sweeps))
        self.is_running = bool(running or sweeps)

    @property
    def summary(self) -> str:
        """The number of runs in each state: `2 running, 5 done, 3 waiting`."""
        states = [watched.run.state for watched in self.runs]
        counts = {state: states.count(state) for state in dict.fromkeys(["running", *states])}
        counts["waiting"] = self.waiting
        return ", ".join(f"{number} {state}" for state, number in counts.items() if number)

    def _read_runs(self) -> list[StoredRun]:
        """Return the runs below the folder, job 10 after job 2; one that is new since the last reading is seen."""
        runs, is_first = [], not self._records
        for folder, reason in run_folder.walk(self.folder):
            before = self._records.get(folder)
            try:
                written = (folder / RECORD_FILE).stat().st_mtime_ns
                if reason is None and (before is None or before[0] != written):
                    self._records[folder] = written, run_folder.read(folder)
            except (OSError, UserError):  # it is just being created, or is damaged
                continue
            if folder in self._records:
                self._seen |= set() if is_first or before else {folder}
                runs.append(StoredRun(folder, self._records[folder][1]))
        return sorted(runs, key=lambda run: run_folder.natural_order(run.folder))


def _count_waiting(sweep: Path) -> int:
    """Return the number of jobs of a sweep without a run; 0 if its record cannot be read."""
    try:
        return sum(not run_folder.holds_run(sweep / name) for name in sweep_folder.read(sweep).jobs)
    except UserError:
        return 0


# -- a table in a terminal, lines elsewhere --


def _show_table(watch: Watch, console: Console) -> None:
    """Show the table on a screen of its own until nothing is running or Ctrl-C, then print the last one.

    The screen is drawn anew when the terminal changes its size, so that nothing of an older one remains.
    """
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while watch.is_running:
                size, drawn = console.size, time.monotonic()
                live.update(_table(watch, console, size.height), refresh=True)
                while console.size == size and time.monotonic() - drawn < READ_SECONDS:
                    time.sleep(RESIZE_SECONDS)
                watch.read()
    finally:
        console.print(_table(watch, console, None))


def _table(watch: Watch, console: Console, height: int | None) -> Text:
    """Return a line per run below a header, and a summary; at most `height` lines, those of running runs first."""
    runs = watch.runs
    overrides = differing_overrides([watched.run for watched in runs])
    columns = [
        TextColumn("id", [watched.run.id for watched in runs]),
        TextColumn("name", [watched.run.name or "" for watched in runs], min_width=8),
        TextColumn("status", [watched.run.state for watched in runs]),
        _numbers("step", runs, lambda progress: f"{progress.step}/{progress.steps}"),
        _numbers("left", runs, lambda progress: _duration(progress.seconds_left)),
        TextColumn(_metric_header(runs), [_number(watched.score) for watched in runs], is_number=True),
        _numbers("loss", runs, lambda progress: _number(progress.loss)),
        _numbers("epoch", runs, lambda progress: _number(progress.epoch, 2)),
        _numbers("pairs/s", runs, lambda progress: _number(progress.pairs_per_second, 0)),
        TextColumn("overrides", overrides, min_width=9),
    ]
    header, *lines = lay_out(columns, available_width(console)) if runs else ["no run has started yet"]
    if height is not None and len(lines) > height - 3:
        first_running = sorted(range(len(lines)), key=lambda i: runs[i].run.state != "running")
        listed = sorted(first_running[: max(0, height - 4)])
        lines = [*(lines[i] for i in listed), f"… and {len(lines) - len(listed)} more"]
    lines = [header, *lines, sanitise(f"{watch.summary} below {watch.folder}").plain]
    lines += [] if height is None else ["Ctrl-C ends this display, not the runs"]
    return Text("\n").join([Text(lines[0], "bold"), *map(Text, lines[1:])])


def _numbers(header: str, runs: Sequence[WatchedRun], text: Callable[[LiveProgress], str]) -> TextColumn:
    """Return a column of texts about the progress; a cell is empty for a run without it."""
    cells = [text(watched.progress) if watched.progress else "" for watched in runs]
    return TextColumn(header, cells, is_number=True)


def _metric_header(runs: Sequence[WatchedRun]) -> str:
    """Return the main metric of the runs, or `metric` if they have several."""
    names = {watched.run.main_metric for watched in runs}
    return names.pop() if len(names) == 1 else "metric"


def _number(value: float | None, digits: int = 3) -> str:
    """Return a number with this many decimals; empty for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def _duration(seconds: float | None) -> str:
    """Return a duration; empty for None."""
    return "" if seconds is None else format_duration(seconds)


def _print_lines(watch: Watch, console: Console) -> None:
    """Print a line about each run that has started or ended, and every `LINE_SECONDS` about those that are running."""
    printed: dict[Path, tuple[str, float]] = {}  # state and time of the last line
    while True:
        for watched in watch.runs:
            state, now = watched.run.state, time.monotonic()
            before = printed.get(watched.run.folder)
            is_due = before is not None and state == "running" and now - before[1] >= LINE_SECONDS
            if before is None or before[0] != state or is_due:
                printed[watched.run.folder] = state, now
                console.print(sanitise(f"{datetime.now():%H:%M:%S}  {watched.line}"), soft_wrap=True)
        if not watch.is_running:
            console.print(sanitise(f"{watch.summary} below {watch.folder}"), soft_wrap=True)
            return
        time.sleep(READ_SECONDS)
        watch.read()


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        "watch",
        description="A live table of the runs that are training below a folder: step, epoch, loss, main metric, "
        "pairs/s and time left. It ends with the last run, or with Ctrl-C, which stops no run. In a file or pipe, "
        "a line about each run is printed now and then.",
    )
    parser.add_argument(
        "folder", nargs="?", metavar="DIR", help="a run, a sweep or a folder above, or a name or id (default: outputs)"
    )
    return parser
