"""Progress of training: a live bar in a terminal, lines of steps and evaluations elsewhere, a table of the results."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich import box
from rich.progress import TextColumn
from rich.table import Table
from rich.text import Text

from lora_bench.config.groups import model_name
from lora_bench.config.metric_names import SHOWN_METRICS
from lora_bench.config.recorded_task import form_of_metrics
from lora_bench.console.format import format_number
from lora_bench.console.stages import Live
from lora_bench.console.text import sanitise

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

MAX_CLASSES_SHOWN = 8
"""Maximum names of classes that are printed before training."""
_SMOOTHING = 0.1
"""Weight of the newest value in moving averages."""


class Display(Live):
    """The progress display of a training: of one run, or of the members of a pack with a row for each.

    Args:
        console: the terminal.
        steps: optimizer updates.
        names: titles of the members of a pack; empty for a single run.
    """

    rows_from = 2
    """Minimum number of names with which each has a row."""

    def __init__(self, console: Console, steps: int, names: Sequence[str] = ()) -> None:
        """Create the display, without losses and metrics yet; fewer than `rows_from` names get no rows."""
        super().__init__(console, steps, TextColumn("{task.fields[state]}", markup=False), state="")
        self.names = names if len(names) >= self.rows_from else ()
        self.losses: dict[int, float] = {}
        """Moving average of the loss of each member."""
        self.metric = "mcc"
        """The name of the metric that is shown beside the loss: the run's main metric."""
        self.score_by_member: dict[int, float] = {}
        """The latest value of that metric of each member."""
        self.active: Collection[int] = range(len(names))
        """Members that are still training."""
        if self.names:
            bar = self.progress.get_renderables
            self.progress.get_renderables = lambda: (*bar(), self._members())  # type: ignore[method-assign]
        self.loss: float | None = None
        """Moving average of the mean loss over the members."""
        self.score: float | None = None
        """The latest value of `metric`."""
        self.pairs_per_second: float | None = None
        self.steps = steps
        self.step = 0
        self.last_step = time.perf_counter()

    def __enter__(self) -> Self:
        self.last_step = time.perf_counter()
        return super().__enter__()

    def stepped(self, step: int, losses: Mapping[int, float], pairs: int) -> None:
        """Show a step: moving averages of losses and throughput; without a terminal, print a line if one is `due`.

        Args:
            step: number of the update, from 1.
            losses: by member, at least one; members without a loss are shown as ended.
            pairs: examples that the step took.
        """
        now = time.perf_counter()
        rate = _smooth(self.pairs_per_second, pairs / max(now - self.last_step, 1e-9))
        self.last_step = now
        self.set_state(step, {member: _smooth(self.losses.get(member), loss) for member, loss in losses.items()}, rate)
        if self.due(step):
            self.screen.print(self.line())

    def set_state(self, step: int, losses: Mapping[int, float], pairs_per_second: float | None) -> None:
        """Show the state after a step.

        Args:
            step: number of the update, from 1.
            losses: the moving average of each member that still trains, at least one.
            pairs_per_second: the moving average of the throughput.
        """
        self.active = losses.keys()
        self.losses |= losses
        self.loss = sum(losses.values()) / len(losses)
        self.step, self.pairs_per_second = step, pairs_per_second
        self.progress.update(self.task, completed=step, state=self._state())

    def evaluated(self, member: int, line: dict[str, Any], metric: str) -> None:
        """Show an evaluation of a member: in its row, or as a printed line where there is no terminal or a single run.

        Its time does not count in the throughput.

        Args:
            member: its number.
            line: of `metrics.jsonl`: epoch, split and metrics.
            metric: the name of the main metric, one of the line's.
        """
        metrics = line["metrics"]
        self.metric = metric
        self.score = self.score_by_member[member] = metrics[metric]
        self.last_step = time.perf_counter()
        self._show_evaluation(member, line, metric)

    def _show_evaluation(self, member: int, line: Mapping[str, Any], metric: str) -> None:
        """Print the metrics of an evaluation, unless the row of the member shows them."""
        if self.names and self.console.is_terminal:
            return
        metrics = line["metrics"]
        title = f"{self.names[member].partition(':')[0]}  " if self.names else ""
        names = SHOWN_METRICS[form_of_metrics(metrics)]
        names = names if metric in names else (metric, *names[:-1])
        main = "  ".join(f"{name} {_number(metrics[name], 3)}" for name in names)
        text = f"epoch {round(line['epoch'], 2):g}  {line['split']}  {main}"  # one line of a terminal
        self.screen.print(f"{title}{text}")

    def line(self) -> str:
        """Return the state of the training as one line."""
        return f"step {self._state()}"

    def _state(self) -> str:
        """Return step, mean loss, metric and throughput as one line; before the first step only its number.

        The metric is left out before the first evaluation, and where each member has a row.
        """
        if self.loss is None:
            return f"{self.step}/{self.steps}"
        fields = [f"{self.step}/{self.steps}", f"loss {self.loss:.3f}"]
        fields += [] if self.score is None or self.names else [f"{self.metric} {self.score:.3f}"]
        return "  ".join([*fields, f"{self.pairs_per_second:.0f} pairs/s"])

    def _members(self) -> Table:
        """Return a table with a row per member: name, loss, metric, and `ended` for one that does not train any more.

        A name that is too long for the terminal is shortened; a missing value is empty.
        """
        table = Table(box=None, pad_edge=False, expand=True)
        table.add_column("job", no_wrap=True, overflow="ellipsis", ratio=1)
        for header in ("loss", self.metric, ""):
            table.add_column(header, justify="right", no_wrap=True)
        for member, name in enumerate(self.names):
            numbers = (_number(values.get(member), 3) for values in (self.losses, self.score_by_member))
            state, style = ("", "") if member in self.active else ("ended", "dim")
            table.add_row(sanitise(name.removeprefix("job ")), *numbers, state, style=style)
        return table


class DisplayFactory(Protocol):
    """A function that makes a `Display`, with its arguments."""

    def __call__(self, console: Console, steps: int, names: Sequence[str]) -> Display:
        """Return a display."""


class JobsDisplay(Display):
    """The progress display of a pack of a sweep: each job has a row, and `SweepProgress` prints the lines."""

    rows_from = 1

    def due(self, done: int) -> bool:
        """Return False: no line is printed for a step."""
        return False

    def line(self) -> str:
        """Return the state of the pack as one line, which begins with its job or the number of its jobs."""
        name = f"{len(self.names)} jobs" if len(self.names) > 1 else self.names[0].partition(":")[0]
        return f"{name}: {super().line()}"

    def _show_evaluation(self, member: int, line: Mapping[str, Any], metric: str) -> None:
        """Print nothing."""


def announcement(records: Sequence[Mapping[str, Any]], adapted: int, notes: Sequence[str]) -> list[str]:
    """Return lines on what is about to be trained, and notes.

    The lines are: adapters and numbers of parameters (of several runs the number of jobs and their sum); data,
    precision and device of the first run; notes.

    Args:
        records: of the runs of a pack, as they start; at least one.
        adapted: number of adapted linears of a member.
        notes: which become `note: TEXT`.
    """
    record = records[0]
    choices, params, environment = record["choices"], record["params"], record["environment"]
    model = model_name(record)
    members = record["config"].get("ensemble", {}).get("members")
    adapters = f"{members} times {choices['adapter']}" if members else choices["adapter"]
    sizes = ", ".join(f"{name} {rows:,}" for name, rows in record["data"]["rows"].items())
    adapter, head, total = (format_number(params[name]) for name in ("adapter", "head", "total"))
    first = f"{adapters} on {model}: {adapted} adapted linears, "
    first += f"{adapter} adapter + {head} head of {total} parameters"
    if len(records) > 1:
        adapters_total = format_number(sum(record["params"]["adapter"] for record in records))
        first = f"{len(records)} jobs on one {model}: {adapters_total} adapter parameters in all"
    data = ", ".join(record["config"].get("tasks", [choices["data"]]))
    count = environment["threads"]
    threads = f"{count} thread{'s' * (count != 1)}"
    lines = [first, f"{data}: {sizes}; {environment['precision']} on {environment['device']}, {threads}"]
    lines += [] if record["config"].get("tasks") else _label_lines(record["data"])
    return [*lines, *(f"note: {note}" for note in notes)]


def _label_lines(data: Mapping[str, Any]) -> list[str]:
    """Return a line with the classes of a task, or the range of its numbers; none where neither is recorded.

    Args:
        data: the section of the record.
    """
    names, ranges = data.get("label_names"), data.get("label_range")
    if names:
        listed = names if len(names) <= MAX_CLASSES_SHOWN else [*names[: MAX_CLASSES_SHOWN - 2], "…", names[-1]]
        return [f"{len(names)} classes: {', '.join(name[:40] for name in listed)}"]
    if ranges and ranges.get("train"):
        low, mean, high = ranges["train"]
        return [f"numbers from {low:g} to {high:g}, mean {mean:.3g}"]
    return []


def show_result(console: Console, folder: Path, record: Mapping[str, Any]) -> None:
    """Print the results of a finished run: metrics, costs and the folder of its record.

    A run of several tasks gets a line for each task and split, selection excluded, in place of tables. Costs that the
    record does not have are left out.

    Args:
        console: the terminal.
        folder: of the run.
        record: of the run.
    """
    cost, metrics = record["cost"], record["metrics"]
    if tasks := record["config"].get("tasks", {}):
        for prefix in _prefixes(metrics):
            split, _, task = prefix.partition("/")
            if split != "selection" and (not task or task in tasks):
                main = "  ".join(f"{name} {_number(value)}" for name, value in _shown_metrics(metrics, prefix).items())
                console.print(Text(f"{prefix}  {main}"))
    else:
        print_metrics(console, metrics)
    costs = [f"{cost['steps']} steps"]
    costs += [f"{cost['train_seconds']:.0f} s"] if cost["train_seconds"] is not None else []
    costs += [f"{cost['pairs_per_second']:.0f} pairs/s"] if cost["pairs_per_second"] else []
    costs += [format_number(cost["train_flops"], "FLOP")]
    costs += [format_number(cost["peak_memory_bytes"], "B") + " peak"] if cost["peak_memory_bytes"] else []
    console.print(Text(" · ".join(costs)))
    console.print(sanitise(f"record: {folder}"), soft_wrap=True)


def _smooth(old: float | None, new: float) -> float:
    """Return the next value of a moving average; the first value if there is no old one."""
    return new if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * new


def print_metrics(console: Console, metrics: Mapping[str, float | None]) -> None:
    """Print all metrics of a record, those of perturbed splits in a table of their own."""
    console.print(metric_table(metrics))
    perturbed = robustness_table(metrics)
    if perturbed is not None:
        console.print(perturbed)


def metric_table(metrics: Mapping[str, float | None]) -> Table:
    """Return a table of a record's metrics (keys `split/metric`) with a row per metric and a column per split.

    Metrics of perturbed splits, calibrated probabilities and single members of an ensemble are left out. The cell of a
    missing metric is empty.
    """
    splits = [split for split in _prefixes(metrics) if f"{split}/changed" not in metrics]
    splits = [split for split in splits if not split.endswith("/calibrated") and "/member_" not in split]
    names = dict.fromkeys(key.rpartition("/")[2] for key in metrics if key.rpartition("/")[0] in splits)
    table = Table("metric", box=box.SIMPLE_HEAD, pad_edge=False)
    for split in splits:
        table.add_column(sanitise(split), justify="right")
    for name in names:
        table.add_row(sanitise(name), *(_number(metrics.get(f"{split}/{name}")) for split in splits))
    return table


def robustness_table(metrics: Mapping[str, float | None]) -> Table | None:
    """Return a table of the metrics of perturbed splits, with a row per split and transform; None if there are none."""
    prefixes = [prefix for prefix in _prefixes(metrics) if f"{prefix}/changed" in metrics]
    if not prefixes:
        return None
    splits = {prefix.split("/")[0] for prefix in prefixes}
    columns = {
        key: header for key, header in _ROBUST.items() if any(f"{prefix}/{key}" in metrics for prefix in prefixes)
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("perturbed", no_wrap=True)
    for header in columns.values():
        table.add_column(header, justify="right")
    for prefix in prefixes:
        name = prefix if len(splits) > 1 else prefix.partition("/")[2]
        table.add_row(sanitise(name), *(_number(metrics.get(f"{prefix}/{key}"), 3) for key in columns))
    return table


_ROBUST = {
    "changed": "changed",
    "accuracy": "acc.",
    "f1": "f1",
    "f1_worst": "worst",
    "f1_drop": "drop",
    "macro_f1": "macro f1",
    "macro_f1_worst": "worst",
    "macro_f1_drop": "drop",
    "spearman": "spearman",
    "spearman_worst": "worst",
    "spearman_drop": "drop",
    "flip_rate": "flips",
    "mean_change": "change",
    "attack_success": "attacked",
}
"""Metrics of a perturbed split with their column headers; `worst` and `drop` are of the metric on their left. A metric
that no split has gets no column."""


def _shown_metrics(metrics: Mapping[str, float | None], prefix: str) -> dict[str, float | None]:
    """Return the recorded metrics of a split, or of a part of one, that are always shown, by name."""
    names = {key.rpartition("/")[2] for key in metrics if key.rpartition("/")[0] == prefix}
    return {name: metrics[f"{prefix}/{name}"] for name in SHOWN_METRICS[form_of_metrics(names)] if name in names}


def _prefixes(metrics: Mapping[str, float | None]) -> list[str]:
    """Return the keys of metrics without the metrics' names: `validation`, `validation/unseen`, `validation/typo`."""
    return list(dict.fromkeys(key.rpartition("/")[0] for key in metrics))


def _number(value: float | None, digits: int = 4) -> str:
    """Return a number with this many decimals; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"
