"""Runs of several tasks (`data.tasks`): what their records say of it, and the folder that each task has.

tasks/<name>/    run.json, metrics.jsonl, predictions/ and adapter/, like those of a run of that task alone
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
    """The tasks that the run of this config learned together; none for a run of one, or for one task's folder."""
    tasks = config.get("tasks")
    return list(tasks) if isinstance(tasks, dict) else []


def task_folder(run: Path, task: str) -> Path:
    """Where a finished run keeps what it has of a task."""
    return run / TASKS / task


def refuse_multitask(run: str | Path, config: Mapping[str, Any], key: str) -> None:
    """Refuse the folder of a run of several tasks where that of one is needed: its head must be chosen."""
    if names := task_names(config):
        places = ", ".join(str(task_folder(Path(run), name)) for name in names)
        raise UserError(
            "learned several tasks", key=key, value=run, remedy=f"Choose one: {places}.", code=Code.UNSUPPORTED
        )


def split_by_task(runs: Iterable[Recorded]) -> tuple[list[Recorded], list[tuple[Path, str]]]:
    """Return runs with those of several tasks replaced by a folder and record of each task, and what was skipped."""
    found: list[Recorded] = []
    skipped: list[tuple[Path, str]] = []
    for run, record in runs:
        names = task_names(record["config"]) if record["status"] == "done" else []
        found += [] if names else [(run, record)]
        for folder in (task_folder(run, name) for name in names):
            try:
                found.append((folder, read(folder)))
            except UserError as error:
                skipped.append((folder, f"{RECORD_FILE} {error.reason}"))
    return found, skipped
