"""The transfer matrix of a sweep: source task by target task, zero-shot and after few examples.

transfer.csv    a row per cell, with mean and standard deviation over seeds
transfer.md     a table for each number of examples
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from lora_bench.config import keys
from lora_bench.files.atomic_io import write as write_file
from lora_bench.records import evaluations, run_folder, sweep_folder
from lora_bench.records.task_folders import task_folder, task_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NO_SOURCE = "no source adapter"
"""The source of a run that is not initialised from another one."""
ALL_TASKS = "all tasks"
"""The source of a run that was trained on all tasks."""
METRICS = ("mcc", "accuracy", "f1")


@dataclass(frozen=True)
class TransferScore:
    """The metrics of one run on one task."""

    trained_on: str
    tested_on: str
    examples: int | None
    """Training examples of the target task; 0: zero-shot transfer, None: all of them."""
    values: dict[str, float]


def data_overrides(job: Sequence[str]) -> dict[str, str]:
    """Return the overrides that choose a job's data: `data`, and `data.path` if it has one."""
    return {keys.key_of(text): text.partition("=")[2] for text in job if keys.key_of(text) in ("data", "data.path")}


def task_of(job: Sequence[str]) -> str:
    """Return the name of a job's task: `ALL_TASKS` with `data.tasks`, else the stem of `data.path`, else `data`."""
    if any(keys.key_of(text) == "data.tasks" for text in job):
        return ALL_TASKS
    choice = data_overrides(job)
    path = choice.get("data.path", "").strip("'\"")
    return Path(path).stem if path else choice.get("data", "")


def write(folder: Path) -> str:
    """Write `transfer.csv` and `transfer.md` over the sweep's finished runs, and return the text of the latter.

    Older files are replaced. Without finished runs there are no rows.

    Args:
        folder: of the sweep.
    """
    scores = list(_scores(folder))
    write_file(folder, "transfer.csv", _csv(scores).encode())
    text = _markdown(scores)
    write_file(folder, "transfer.md", text.encode())
    return text


def _scores(folder: Path) -> Iterator[TransferScore]:
    """Yield the scores of the sweep's finished runs on each task that they were tested on.

    A run below `train` gives one on its own task (`examples` None) and a zero-shot one for each of its evaluations that
    is named as a task of the sweep; a run of all tasks one for each task, with `examples` 0. Others give one on their
    task, with the source that they were initialised from.
    """
    jobs = sweep_folder.read(folder).jobs
    tasks = {name: task_of(job) for name, job in jobs.items()}
    for name in jobs:
        if not run_folder.holds_run(folder / name) or (run := run_folder.read(folder / name))["status"] != "done":
            continue
        values = _values(run["metrics"])
        if learned := task_names(run["config"]):
            for task in learned:
                of_task = run_folder.read(task_folder(folder / name, task))
                yield TransferScore(ALL_TASKS, task, 0, _values(of_task["metrics"]))
        elif name.startswith("train/"):
            yield TransferScore(tasks[name], tasks[name], None, values)
            for title, evaluation in evaluations.read_evaluations(folder / name).items():
                if title in tasks.values():
                    yield TransferScore(tasks[name], title, 0, _values(evaluation.metrics))
        else:
            init_from = run["config"]["adapter"]["init_from"]
            source = tasks[source_of(init_from).as_posix()] if init_from else NO_SOURCE
            yield TransferScore(source, tasks[name], run["config"]["data"]["train_size"], values)


def source_of(init_from: str | Path) -> Path:
    """Return the folder, relative to the sweep's (`train/3`), of the run that a run was initialised from.

    Args:
        init_from: the source run's folder, or the folder of one of its tasks.
    """
    names = Path(init_from).parts
    return Path(*(names[-4:-2] if names[-2] == "tasks" else names[-2:]))


def _values(metrics: dict[str, Any]) -> dict[str, float]:
    """Return `METRICS` of the validation split, or else of the first reported split, without missing ones."""
    splits = [key.removesuffix("/mcc") for key in metrics if key.count("/") == 1 and key.endswith("/mcc")]
    splits = [split for split in splits if split != "selection"]
    split = "validation" if "validation" in splits else next(iter(splits), None)
    values = {name: metrics.get(f"{split}/{name}") for name in METRICS}
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _csv(scores: Sequence[TransferScore]) -> str:
    """Return `transfer.csv`: a row per cell with mean and standard deviation of `METRICS`, and the number of runs."""
    text = io.StringIO()
    header = ["trained_on", "tested_on", "examples", *(f"{m}{end}" for m in METRICS for end in ("", "_std")), "n"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for (source, target, examples), cell in _cells(scores).items():
        row: list[Any] = [source, target, "all" if examples is None else examples]
        for name in METRICS:
            values = [score.values[name] for score in cell if name in score.values]
            row += [fmean(values) if values else "", stdev(values) if len(values) > 1 else ""]
        writer.writerow([*row, len(cell)])
    return text.getvalue()


def _cells(scores: Sequence[TransferScore]) -> dict[tuple[str, str, int | None], list[TransferScore]]:
    """Group the scores by source, target and number of examples: a cell holds one score for each seed."""
    cells: dict[tuple[str, str, int | None], list[TransferScore]] = {}
    for score in scores:
        cells.setdefault((score.trained_on, score.tested_on, score.examples), []).append(score)
    return cells


def _markdown(scores: Sequence[TransferScore]) -> str:
    """Return `transfer.md`: a table of the MCC for each number of training examples of the target task, and a note.

    A row is a task trained on, a column a task tested on, a cell the mean ± standard deviation over seeds, or empty.
    The diagonal of every table shows the runs that were trained on all examples of the task. Rows for an adapter of all
    tasks and, with training examples, for no source adapter come last.
    """
    cells = _cells(scores)
    targets = list(dict.fromkeys(score.tested_on for score in scores if score.examples is None))
    levels = sorted({score.examples for score in scores if score.examples is not None})
    tables = []
    has_all_tasks = any(score.trained_on == ALL_TASKS for score in scores)
    for level in levels:
        condition = f"after {level:,} examples of it" if level else "zero-shot"
        rows = [*targets, *([ALL_TASKS] if has_all_tasks else []), *([NO_SOURCE] if level else [])]
        header = f"| mcc, {condition}: trained on | {' | '.join(targets)} |"
        lines = [header, f"| --- |{' ---: |' * len(targets)}"]
        for source in rows:
            row = [
                _cell_text(cells.get((source, target, None if source == target else level), [])) for target in targets
            ]
            lines.append(f"| {source} | {' | '.join(row)} |")
        tables.append("\n".join(lines))
    notes = ["Columns: the task tested on. Diagonal: trained on the task itself, with all its examples."]
    if has_all_tasks:
        notes.append(f"{ALL_TASKS}: one adapter trained on all of them, the task tested on among them, with its head.")
    return "\n\n".join([*tables, " ".join(notes)]) + "\n"


def _cell_text(cell: Sequence[TransferScore]) -> str:
    """Return mean and standard deviation of the MCC over seeds; empty without a score."""
    values = [score.values["mcc"] for score in cell if "mcc" in score.values]
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
