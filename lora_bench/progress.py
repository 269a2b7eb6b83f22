"""What a person sees of a training: a live bar in a terminal, a line at each look elsewhere, one table at the end."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from rich import box
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_bench.screen import shown
from lora_bench.tables import human

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console

LINES_PER_RUN = 10  # without a terminal: at most so many lines between start and end
_SMOOTHING = 0.1


class Display:
    """Tells of one run's training; a context manager that a traceback or Ctrl-C leaves with a clean screen.

    Args:
        console: where to.
        steps: optimizer updates to come.
        titles: what the members of a pack are called; of a single run its name is not told.
    """

    def __init__(self, console: Console, steps: int, titles: Sequence[str] = ("",)) -> None:
        self.console = console
        self.steps = steps
        self.titles = titles
        self.line_every = math.ceil(steps / LINES_PER_RUN)
        self.loss: float | None = None
        self.mcc: float | None = None
        self.rate: float | None = None
        self.since = time.perf_counter()
        columns = [
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(compact=True),
        ]
        self.progress = Progress(*columns, console=console, expand=True, transient=True)
        self.task = self.progress.add_task("", total=steps, state="")

    def __enter__(self) -> Display:
        if self.console.is_terminal:  # elsewhere it is never shown
            self.progress.start()
        self.since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        now = time.perf_counter()
        loss, rate = sum(losses.values()) / len(losses), pairs / max(now - self.since, 1e-9)
        self.loss = _smooth(self.loss, loss)
        self.rate = _smooth(self.rate, rate)
        self.since = now
        self.progress.update(self.task, completed=step, state=self._state(step))
        if not self.console.is_terminal and step % self.line_every == 0:
            self.console.print(Text(f"step {self._state(step)}"))

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        metrics = line["metrics"]
        self.mcc = metrics["mcc"]
        main = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("accuracy", "f1", "mcc"))
        self.console.print(Text(f"epoch {round(line['epoch'], 2):g}  {line['split']}  {main}"))  # 60 columns at most
        self.since = time.perf_counter()

    def _state(self, step: int) -> str:
        parts = [f"{step}/{self.steps}", f"loss {self.loss:.3f}"]
        parts += [] if self.mcc is None else [f"mcc {self.mcc:.3f}"]
        return "  ".join([*parts, f"{self.rate:.0f} pairs/s"])


def announce(console: Console, records: Sequence[Mapping[str, Any]], adapted: int, notes: Sequence[str]) -> None:
    """What is about to run, from the records of a pack's members, and what the user should know about it."""
    record = records[0]
    choices, params, where = record["choices"], record["params"], record["environment"]
    sizes = ", ".join(f"{name} {rows:,}" for name, rows in record["data"]["rows"].items())
    first = (
        f"{choices['adapter']} on {choices['model']}: {adapted} adapted linears, "
        f"{human(params['adapter'])} adapter + {human(params['head'])} head of {human(params['total'])} parameters"
    )
    if len(records) > 1:
        adapters = sum(each["params"]["adapter"] for each in records)
        first = f"{len(records)} jobs on one {choices['model']}: {human(adapters)} adapter parameters in all"
    lines = [
        first,
        f"{choices['data']}: {sizes}; {where['precision']} on {where['device']}, {where['threads']} threads",
    ]
    for line in [*lines, *(f"note: {note}" for note in notes)]:
        console.print(shown(line))


def show_result(console: Console, folder: Path, record: Mapping[str, Any], *, title: str = "", brief: bool) -> None:
    """How a run ended: its metrics, or one line of them with `brief`, what it cost, and where its record is."""
    cost, metrics = record["cost"], record["metrics"]
    if title:
        console.print(shown(title, style="bold"))
    if brief:
        splits = dict.fromkeys(key.split("/")[0] for key in metrics if not key.startswith("selection/"))
        for split in splits:
            main = "  ".join(f"{name} {metrics[f'{split}/{name}']:.4f}" for name in ("accuracy", "f1", "mcc"))
            console.print(Text(f"{split}  {main}"))
    else:
        console.print(metric_table(metrics))
    spent = [f"{cost['steps']} steps"]
    spent += [f"{cost['train_seconds']:.0f} s"] if cost["train_seconds"] is not None else []
    spent += [f"{cost['pairs_per_second']:.0f} pairs/s"] if cost["pairs_per_second"] else []
    spent += [human(cost["train_flops"], "FLOP")]
    spent += [human(cost["peak_memory_bytes"], "B") + " peak"] if cost["peak_memory_bytes"] else []
    console.print(Text(" · ".join(spent)))
    console.print(shown(f"record: {folder}"), soft_wrap=True)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * new


def metric_table(metrics: Mapping[str, float | None]) -> Table:
    """A record's flat `split/metric` values: one row per metric, one column per split."""
    splits = list(dict.fromkeys(key.split("/")[0] for key in metrics))
    names = list(dict.fromkeys(key.split("/", 1)[1] for key in metrics))
    table = Table("metric", box=box.SIMPLE_HEAD, pad_edge=False)
    for split in splits:
        table.add_column(shown(split), justify="right")
    for name in names:
        values = [metrics.get(f"{split}/{name}") for split in splits]
        table.add_row(shown(name), *("" if value is None else f"{value:.4f}" for value in values))
    return table
