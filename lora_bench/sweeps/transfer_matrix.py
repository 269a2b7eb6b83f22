"""The transfer matrix of a sweep: task trained on by task tested on, as it is and after so many examples.

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
from lora_bench.records import run_folder, sweep_folder
from lora_bench.records.evaluations import evaluations
from lora_bench.records.task_folders import folder_of, names_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NOTHING = "nothing"
"""What was trained on before, where a task began from none."""
EVERYTHING = "all tasks"
"""What was trained on where one run learned all tasks."""
METRICS = ("mcc", "accuracy", "f1")


@dataclass(frozen=True)
class Found:
    """One figure of one run."""

    trained_on: str
    tested_on: str
    examples: int | None
    """Of the second task; 0: scored as it is, None: trained on all there are."""
    values: dict[str, float]


def told_of(job: Sequence[str]) -> dict[str, str]:
    """What says which data a job is of: its choice, and its path where it has one."""
    return {key: value for key, value in map(keys.split_override, job) if key in ("data", "data.path")}


def task_of(job: Sequence[str]) -> str:
    """The name of a job's task: of its folder where it has one, else of its data; where it learns all, `EVERYTHING`."""
    if any(keys.key_of(text) == "data.tasks" for text in job):
        return EVERYTHING
    told = told_of(job)
    path = told.get("data.path", "").strip("'\"")
    return Path(path).stem if path else told.get("data", "")


def write(folder: Path) -> str:
    """Write the matrix of the sweep in `folder`, as far as its runs are done, and return it as text."""
    found = list(_found(folder))
    write_file(folder, "transfer.csv", _csv(found).encode())
    text = _markdown(found)
    write_file(folder, "transfer.md", text.encode())
    return text


def _found(folder: Path) -> Iterator[Found]:
    jobs = sweep_folder.read(folder).jobs
    tasks = {name: task_of(job) for name, job in jobs.items()}
    for name in jobs:
        if not (folder / name / "run.json").exists() or (run := run_folder.read(folder / name))["status"] != "done":
            continue
        own = _values(run["metrics"])
        if learned := names_of(run["config"]):
            for task in learned:
                of_task = run_folder.read(folder_of(folder / name, task))
                yield Found(EVERYTHING, task, 0, _values(of_task["metrics"]))
        elif name.startswith("train/"):
            yield Found(tasks[name], tasks[name], None, own)
            for title, evaluation in evaluations(folder / name).items():
                if title in tasks.values():
                    yield Found(tasks[name], title, 0, _values(evaluation.metrics))
        else:
            start = run["config"]["adapter"]["init_from"]
            before = tasks[source_of(start).as_posix()] if start else NOTHING
            yield Found(before, tasks[name], run["config"]["data"]["train_size"], own)


def source_of(start: str | Path) -> Path:
    """The folder, below the sweep's, of the run that `start` is of: a run's own folder, or that of one of its tasks."""
    parts = Path(start).parts
    return Path(*(parts[-4:-2] if parts[-2] == "tasks" else parts[-2:]))


def _values(metrics: dict[str, Any]) -> dict[str, float]:
    """The main figures on validation, else on the first reported split that there is."""
    splits = [key.removesuffix("/mcc") for key in metrics if key.count("/") == 1 and key.endswith("/mcc")]
    splits = [split for split in splits if split != "selection"]
    split = "validation" if "validation" in splits else next(iter(splits), None)
    found = {name: metrics.get(f"{split}/{name}") for name in METRICS}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def _csv(found: Sequence[Found]) -> str:
    text = io.StringIO()
    header = ["trained_on", "tested_on", "examples", *(f"{m}{end}" for m in METRICS for end in ("", "_std")), "n"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for place, cells in _cells(found).items():
        row: list[Any] = [place[0], place[1], "all" if place[2] is None else place[2]]
        for name in METRICS:
            values = [cell.values[name] for cell in cells if name in cell.values]
            row += [fmean(values) if values else "", stdev(values) if len(values) > 1 else ""]
        writer.writerow([*row, len(cells)])
    return text.getvalue()


def _cells(found: Sequence[Found]) -> dict[tuple[str, str, int | None], list[Found]]:
    cells: dict[tuple[str, str, int | None], list[Found]] = {}
    for each in found:
        cells.setdefault((each.trained_on, each.tested_on, each.examples), []).append(each)
    return cells


def _markdown(found: Sequence[Found]) -> str:
    cells = _cells(found)
    targets = list(dict.fromkeys(each.tested_on for each in found if each.examples is None))
    levels = sorted({each.examples for each in found if each.examples is not None})
    parts = []
    for level in levels:
        told = f"after {level:,} examples of it" if level else "as it is"
        together = any(each.trained_on == EVERYTHING for each in found)
        rows = [*targets, *([EVERYTHING] if together else []), *([NOTHING] if level else [])]
        header = f"| mcc, {told}: trained on | {' | '.join(targets)} |"
        lines = [header, f"| --- |{' ---: |' * len(targets)}"]
        for source in rows:
            shown = [_shown(cells.get((source, target, None if source == target else level), [])) for target in targets]
            lines.append(f"| {source} | {' | '.join(shown)} |")
        parts.append("\n".join(lines))
    notes = ["Columns: the task tested on. Diagonal: trained on the task itself, with all its examples."]
    if any(each.trained_on == EVERYTHING for each in found):
        notes.append(f"{EVERYTHING}: one adapter trained on all of them, the task tested on among them, with its head.")
    return "\n\n".join([*parts, " ".join(notes)]) + "\n"


def _shown(cells: Sequence[Found]) -> str:
    values = [cell.values["mcc"] for cell in cells if "mcc" in cell.values]
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
