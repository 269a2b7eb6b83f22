"""The transfer matrices of a sweep, one of each setting: source task by target task, zero-shot and after few examples.

transfer.csv    a row per cell, with mean and standard deviation over seeds
transfer.md     a table for each setting and number of examples
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_bench.config import keys
from lora_bench.config.metric_names import SHOWN_METRICS
from lora_bench.config.recorded_task import main_metric, recorded_form
from lora_bench.files.atomic_io import write as write_file
from lora_bench.records import evaluations, run_folder, sweep_folder
from lora_bench.records.task_folders import task_folder, task_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NO_SOURCE = "no source adapter"
"""The source of a run that is not initialised from another one."""
ALL_TASKS = "all tasks"
"""The source of a run that was trained on all tasks."""
OUTSIDE_THE_SETTING = ("seed", "name", "tags", "notes")
"""Keys that may differ between the runs of one cell."""

Setting: TypeAlias = "tuple[tuple[str, str], ...]"
"""Keys and values in which the jobs of one task differ; empty if they differ in the seed alone."""


@dataclass(frozen=True)
class TransferScore:
    """The metrics of one run on one task."""

    trained_on: str
    tested_on: str
    examples: int | None
    """Training examples of the target task; 0: zero-shot transfer, None: all of them."""
    values: dict[str, float]
    """The metrics in `SHOWN_METRICS` and the main metric, by name."""
    metric: str = "mcc"
    """The main metric of the run."""
    setting: Setting = ()


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
    setting_keys = _setting_keys([job for name, job in jobs.items() if name.startswith("train/")])
    for name, job in jobs.items():
        if not run_folder.holds_run(folder / name) or (run := run_folder.read(folder / name))["status"] != "done":
            continue
        values, metric = _values(run, run["metrics"]), main_metric(run)
        chosen = dict(map(keys.split_override, job))
        setting = tuple((key, chosen[key]) for key in setting_keys if key in chosen)
        if learned := task_names(run["config"]):
            for task in learned:
                of_task = run_folder.read(task_folder(folder / name, task))
                task_values, task_metric = _values(of_task, of_task["metrics"]), main_metric(of_task)
                yield TransferScore(ALL_TASKS, task, 0, task_values, task_metric, setting)
        elif name.startswith("train/"):
            yield TransferScore(tasks[name], tasks[name], None, values, metric, setting)
            for title, evaluation in evaluations.read_evaluations(folder / name).items():
                if title in tasks.values():
                    yield TransferScore(tasks[name], title, 0, _values(run, evaluation.metrics), metric, setting)
        else:
            init_from = run["config"]["adapter"]["init_from"]
            source = tasks[source_of(init_from).as_posix()] if init_from else NO_SOURCE
            yield TransferScore(source, tasks[name], run["config"]["data"]["train_size"], values, metric, setting)


def _setting_keys(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys in which jobs of one task differ, as far as they belong to its setting."""
    values_by_task: dict[str, list[dict[str, str]]] = {}
    for job in jobs:
        values_by_task.setdefault(task_of(job), []).append(dict(map(keys.split_override, job)))
    return [
        key
        for key in dict.fromkeys(keys.key_of(text) for job in jobs for text in job)
        if key not in OUTSIDE_THE_SETTING
        and not key.startswith("hydra.")
        and any(len({values.get(key) for values in of_task}) > 1 for of_task in values_by_task.values())
    ]


def source_of(init_from: str | Path) -> Path:
    """Return the folder, relative to the sweep's (`train/3`), of the run that a run was initialised from.

    Args:
        init_from: the source run's folder, or the folder of one of its tasks.
    """
    names = Path(init_from).parts
    return Path(*(names[-4:-2] if names[-2] == "tasks" else names[-2:]))


def _values(record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, float]:
    """Return the shown metrics of the validation split, or else of the first reported split, without missing ones.

    Args:
        record: of the run, which says what its main metric is.
        metrics: of the run or of a later evaluation, by `<split>/<metric>`.
    """
    names = dict.fromkeys([main_metric(record), *SHOWN_METRICS[recorded_form(record)]])
    splits = dict.fromkeys(key.partition("/")[0] for key in metrics if key.count("/") == 1)
    reported = [split for split in splits if split not in ("train", "selection")]
    split = "validation" if "validation" in reported else next(iter(reported), None)
    values = {name: metrics.get(f"{split}/{name}") for name in names}
    return {name: value for name, value in values.items() if isinstance(value, float)}


def _csv(scores: Sequence[TransferScore]) -> str:
    """Return `transfer.csv`: a row per cell with mean and standard deviation of each metric, and the number of runs."""
    text = io.StringIO()
    names = list(dict.fromkeys(name for score in scores for name in score.values)) or ["mcc", "accuracy", "f1"]
    setting_keys = list(dict.fromkeys(key for score in scores for key, _ in score.setting))
    header = [*setting_keys, "trained_on", "tested_on", "examples"]
    header += [*(f"{m}{end}" for m in names for end in ("", "_std")), "n"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for (setting, source, target, examples), cell in _cells(scores).items():
        row: list[Any] = [dict(setting).get(key, "") for key in setting_keys]
        row += [source, target, "all" if examples is None else examples]
        for name in names:
            values = [score.values[name] for score in cell if name in score.values]
            row += [fmean(values) if values else "", stdev(values) if len(values) > 1 else ""]
        writer.writerow([*row, len(cell)])
    return text.getvalue()


def _cells(scores: Sequence[TransferScore]) -> dict[tuple[Setting, str, str, int | None], list[TransferScore]]:
    """Group the scores by setting, source, target and number of examples: a cell holds one score for each seed."""
    cells: dict[tuple[Setting, str, str, int | None], list[TransferScore]] = {}
    for score in scores:
        cells.setdefault((score.setting, score.trained_on, score.tested_on, score.examples), []).append(score)
    return cells


def _markdown(scores: Sequence[TransferScore]) -> str:
    """Return `transfer.md`: a table of the main metric for each number of training examples of the target task.

    If there are several settings, each has tables of its own below a line that names it. A note follows. Where the
    tasks have several main metrics, the header of a column names its own. A row is a task trained on, a column a task
    tested on, a cell the mean ± standard deviation over seeds, or empty. The diagonal of every table shows the runs
    that were trained on all examples of the task. Rows for an adapter of all tasks and, with training examples, for no
    source adapter come last.
    """
    cells = _cells(scores)
    metric_by_target = {score.tested_on: score.metric for score in scores if score.examples is None}
    targets, metrics = list(metric_by_target), set(metric_by_target.values())
    metric = next(iter(metrics), "mcc") if len(metrics) <= 1 else "main metric"
    titles = [name if len(metrics) <= 1 else f"{name} ({metric_by_target[name]})" for name in targets]
    levels = sorted({score.examples for score in scores if score.examples is not None})
    tables = []
    has_all_tasks = any(score.trained_on == ALL_TASKS for score in scores)
    settings = list(dict.fromkeys(score.setting for score in scores))
    for setting, level in product(settings, levels):
        if len(settings) > 1 and level == levels[0]:
            tables.append(f"{' '.join(f'{key}={value}' for key, value in setting) or 'default settings'}:")
        condition = f"after {level:,} examples of it" if level else "zero-shot"
        rows = [*targets, *([ALL_TASKS] if has_all_tasks else []), *([NO_SOURCE] if level else [])]
        header = f"| {metric}, {condition}: trained on | {' | '.join(titles)} |"
        lines = [header, f"| --- |{' ---: |' * len(targets)}"]
        for source in rows:
            row = [
                _cell_text(cells.get((setting, source, target, None if source == target else level), []), name)
                for target, name in metric_by_target.items()
            ]
            lines.append(f"| {source} | {' | '.join(row)} |")
        tables.append("\n".join(lines))
    notes = ["Columns: the task tested on. Diagonal: trained on the task itself, with all its examples."]
    if has_all_tasks:
        notes.append(f"{ALL_TASKS}: one adapter trained on all of them, the task tested on among them, with its head.")
    return "\n\n".join([*tables, " ".join(notes)]) + "\n"


def _cell_text(cell: Sequence[TransferScore], metric: str) -> str:
    """Return mean and standard deviation of a metric over seeds; empty without a score."""
    values = [score.values[metric] for score in cell if metric in score.values]
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
