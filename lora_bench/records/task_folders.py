"""Runs of several tasks (`data.tasks`): the names of their tasks, and a folder for each task.

tasks/<name>/    run.json, metrics.jsonl, predictions/ and adapter/, as in the folder of a run of one task
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_bench.errors import Code, UserError
from lora_bench.records.run_folder import RECORD_FILE, read

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Recorded: TypeAlias = "tuple[Path, dict[str, Any]]"
"""A run's folder and record."""


TASKS = "tasks"
"""The folder, inside a run's folder, of its tasks' folders."""


def task_names(config: Mapping[str, Any]) -> list[str]:
    """Return the tasks of a run from its config; empty for a run of one task and for the folder of one task."""
    tasks = config.get("tasks")
    return list(tasks) if isinstance(tasks, dict) else []


def task_folder(run: Path, task: str) -> Path:
    """Return the folder, inside a run's folder, of one of its tasks."""
    return run / TASKS / task


def refuse_multitask(run: str | Path, config: Mapping[str, Any], key: str) -> None:
    """Refuse the folder of a run of several tasks where a single task, and so one head, is needed.

    Args:
        run: its folder.
        config: in its record.
        key: the command-line option that names the folder.

    Raises:
        UserError: the run has several tasks; the message lists their folders.
    """
    if names := task_names(config):
        folders = ", ".join(str(task_folder(Path(run), name)) for name in names)
        raise UserError(
            "is a run of several tasks",
            key=key,
            value=run,
            remedy=f"Choose one: {folders}.",
            code=Code.UNSUPPORTED,
        )


def split_by_task(runs: Iterable[Recorded]) -> tuple[list[Recorded], list[tuple[Path, str]]]:
    """Replace each finished run of several tasks by the runs of its tasks; other runs stay, unfinished ones included.

    Returns:
        The runs; and the folders of tasks that cannot be read, with the reason.
    """
    of_one_task: list[Recorded] = []
    skipped: list[tuple[Path, str]] = []
    for run, record in runs:
        names = task_names(record["config"]) if record["status"] == "done" else []
        of_one_task += [] if names else [(run, record)]
        for folder in (task_folder(run, name) for name in names):
            try:
                of_one_task.append((folder, read(folder)))
            except UserError as error:
                skipped.append((folder, f"{RECORD_FILE} {error.reason}"))
    return of_one_task, skipped
