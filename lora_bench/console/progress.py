"""What a person sees of a training: a live bar in a terminal, a line at each look elsewhere, one table at the end."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich import box
from rich.console import Group
from rich.live import Live as Refreshed
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_bench.console.format import format_number
from lora_bench.console.text import sanitise

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console
    from rich.progress import ProgressColumn

LINES_PER_RUN = 10  # without a terminal: at most so many lines between start and end
_SMOOTHING = 0.1


class Live:
    """A live bar in a terminal; elsewhere it is never shown, and `due` says when a line is to be printed instead.

    A context manager that a traceback or Ctrl-C leaves with a clean screen.
    """

    def __init__(self, console: Console, total: int, *columns: ProgressColumn, **fields: Any) -> None:
        self.console = console
        self.total = total
        bar = [BarColumn(bar_width=None), *columns, TimeRemainingColumn(compact=True)]
        self.progress = Progress(*bar, console=console, expand=True, transient=True)
        self.task = self.progress.add_task("", total=total, **fields)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def due(self, done: int) -> bool:
        return not self.console.is_terminal and done % math.ceil(self.total / LINES_PER_RUN) == 0


class Display(Live):
    """Tells of a training of so many steps: one run, or the members of a pack with a row for each.

    Args:
        console: where.
        steps: optimizer updates.
        names: what a sweep calls the members of a pack; none for a run by itself.
    """

    rows_from = 2
    """Names from which on each has a row."""

    def __init__(self, console: Console, steps: int, names: Sequence[str] = ()) -> None:
        super().__init__(console, steps, TextColumn("{task.fields[state]}", markup=False), state="")
        self.names = names if len(names) >= self.rows_from else ()
        self.losses: dict[int, float] = {}
        self.looks: dict[int, float] = {}
        """The last selection MCC of each member."""
        self.live: Collection[int] = range(len(names))
        if self.names:
            bar = self.progress.get_renderables
            self.progress.get_renderables = lambda: (*bar(), self._members())  # type: ignore[method-assign]
        self.loss: float | None = None
        self.mcc: float | None = None
        self.rate: float | None = None
        self.since = time.perf_counter()

    def __enter__(self) -> Self:
        self.since = time.perf_counter()
        return super().__enter__()

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        now = time.perf_counter()
        loss, rate = sum(losses.values()) / len(losses), pairs / max(now - self.since, 1e-9)
        self.loss = _smooth(self.loss, loss)
        self.live = losses.keys()
        self.losses |= {member: _smooth(self.losses.get(member), own) for member, own in losses.items()}
        self.rate = _smooth(self.rate, rate)
        self.since = now
        self.progress.update(self.task, completed=step, state=self._state(step))
        if self.due(step):
            self.console.print(Text(f"step {self._state(step)}"))

    def evaluated(self, member: int, line: dict[str, Any]) -> None:
        metrics = line["metrics"]
        self.mcc = metrics["mcc"]
        self.looks[member] = metrics["mcc"]
        self.since = time.perf_counter()
        if self.names and self.console.is_terminal:  # its row says it
            return
        whose = f"{self.names[member].partition(':')[0]}  " if self.names else ""
        main = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("accuracy", "f1", "mcc"))
        text = f"epoch {round(line['epoch'], 2):g}  {line['split']}  {main}"  # 60 columns at most
        self.console.print(Text(f"{whose}{text}"))

    def _state(self, step: int) -> str:
        parts = [f"{step}/{self.total}", f"loss {self.loss:.3f}"]
        parts += [] if self.mcc is None or self.names else [f"mcc {self.mcc:.3f}"]
        return "  ".join([*parts, f"{self.rate:.0f} pairs/s"])

    def _members(self) -> Table:
        """A row per member; a name that is too long for the terminal is cut, the numbers never."""
        table = Table(box=None, pad_edge=False, expand=True)
        table.add_column("job", no_wrap=True, overflow="ellipsis", ratio=1)
        for header in ("loss", "mcc", ""):
            table.add_column(header, justify="right", no_wrap=True)
        for member, name in enumerate(self.names):
            numbers = (_number(found.get(member), 3) for found in (self.losses, self.looks))
            style = "" if member in self.live else "dim"
            table.add_row(
                sanitise(name.removeprefix("job ")), *numbers, "" if member in self.live else "ended", style=style
            )
        return table


class DisplayFactory(Protocol):
    """What makes a display of so many steps of the members with these names."""

    def __call__(self, console: Console, steps: int, names: Sequence[str]) -> Display: ...


class RowDisplay(Display):
    """One of several displays on a screen: every name has its row."""

    rows_from = 1


class Screen:
    """One live table of several trainings at a time, each with its bar and its rows; shown in a terminal only.

    A context manager like `Live`.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.displays: dict[int, Display] = {}
        self.refreshed = Refreshed(console=console, get_renderable=self._all, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.refreshed.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.refreshed.stop()

    def _all(self) -> Group:
        displays = list(self.displays.values())
        return Group(*(renderable for display in displays for renderable in display.progress.get_renderables()))


def announce(console: Console, records: Sequence[Mapping[str, Any]], adapted: int, notes: Sequence[str]) -> None:
    """What is about to run, from the records of a pack's members, and what the user should know about it."""
    record = records[0]
    choices, params, where = record["choices"], record["params"], record["environment"]
    members = record["config"].get("ensemble", {}).get("members")
    adapters = f"{members} times {choices['adapter']}" if members else choices["adapter"]
    sizes = ", ".join(f"{name} {rows:,}" for name, rows in record["data"]["rows"].items())
    adapter, head, total = (format_number(params[name]) for name in ("adapter", "head", "total"))
    first = f"{adapters} on {choices['model']}: {adapted} adapted linears, "
    first += f"{adapter} adapter + {head} head of {total} parameters"
    if len(records) > 1:
        adapters_total = format_number(sum(record["params"]["adapter"] for record in records))
        first = f"{len(records)} jobs on one {choices['model']}: {adapters_total} adapter parameters in all"
    data = ", ".join(record["config"].get("tasks", [choices["data"]]))
    lines = [
        first,
        f"{data}: {sizes}; {where['precision']} on {where['device']}, {where['threads']} threads",
    ]
    for line in [*lines, *(f"note: {note}" for note in notes)]:
        console.print(sanitise(line))


def show_result(console: Console, folder: Path, record: Mapping[str, Any], *, title: str = "", brief: bool) -> None:
    """How a run ended: its metrics, or one line of them with `brief`, what it cost, and where its record is."""
    cost, metrics = record["cost"], record["metrics"]
    if title:
        console.print(sanitise(title, style="bold"))
    tasks = record["config"].get("tasks", {})
    if brief or tasks:
        for place in _places(metrics):
            split, _, task = place.partition("/")
            if split != "selection" and (not task or task in tasks):
                main = "  ".join(f"{name} {metrics[f'{place}/{name}']:.4f}" for name in ("accuracy", "f1", "mcc"))
                console.print(Text(f"{place}  {main}"))
    else:
        print_metrics(console, metrics)
    spent = [f"{cost['steps']} steps"]
    spent += [f"{cost['train_seconds']:.0f} s"] if cost["train_seconds"] is not None else []
    spent += [f"{cost['pairs_per_second']:.0f} pairs/s"] if cost["pairs_per_second"] else []
    spent += [format_number(cost["train_flops"], "FLOP")]
    spent += [format_number(cost["peak_memory_bytes"], "B") + " peak"] if cost["peak_memory_bytes"] else []
    console.print(Text(" · ".join(spent)))
    console.print(sanitise(f"record: {folder}"), soft_wrap=True)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * new


def print_metrics(console: Console, metrics: Mapping[str, float | None]) -> None:
    """All that was scored, in one table or two."""
    console.print(metric_table(metrics))
    perturbed = robustness_table(metrics)
    if perturbed is not None:
        console.print(perturbed)


def metric_table(metrics: Mapping[str, float | None]) -> Table:
    """A record's flat `split/metric` values, a row per metric; not perturbed, calibrated or single members' ones."""
    places = [place for place in _places(metrics) if f"{place}/changed" not in metrics]
    places = [place for place in places if not place.endswith("/calibrated") and "/member_" not in place]
    names = dict.fromkeys(key.rpartition("/")[2] for key in metrics if key.rpartition("/")[0] in places)
    table = Table("metric", box=box.SIMPLE_HEAD, pad_edge=False)
    for place in places:
        table.add_column(sanitise(place), justify="right")
    for name in names:
        table.add_row(sanitise(name), *(_number(metrics.get(f"{place}/{name}")) for place in places))
    return table


def robustness_table(metrics: Mapping[str, float | None]) -> Table | None:
    """What was scored perturbed: one row per split and transform; None if nothing was."""
    places = [place for place in _places(metrics) if f"{place}/changed" in metrics]
    if not places:
        return None
    splits = {place.split("/")[0] for place in places}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("perturbed", no_wrap=True)
    for header in _ROBUST.values():
        table.add_column(header, justify="right")
    for place in places:
        name = place if len(splits) > 1 else place.partition("/")[2]
        table.add_row(sanitise(name), *(_number(metrics.get(f"{place}/{key}"), 3) for key in _ROBUST))
    return table


_ROBUST = {
    "changed": "changed",
    "accuracy": "acc.",
    "f1": "f1",
    "f1_worst": "worst",
    "f1_drop": "drop",
    "flip_rate": "flips",
    "attack_success": "attacked",
}
"""Of each transform, with what stands above the column; worst and drop are those of f1."""


def _places(metrics: Mapping[str, float | None]) -> list[str]:
    """`validation`, `validation/unseen`, `validation/typo`: what stands before the metrics' names."""
    return list(dict.fromkeys(key.rpartition("/")[0] for key in metrics))


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"
