"""The content of a sweep's progress display, from the sweep's record and settings; torch is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_bench.errors import shell_argument
from lora_bench.records.job import job_titles, read_result
from lora_bench.records.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_bench.console.sweep_progress import SweepProgress
    from lora_bench.records.settings import Settings
    from lora_bench.records.sweep_folder import Sweep

_ASSUMED_ROWS = 10_000
"""Training rows of data whose size is not known before they are loaded."""


def expect_jobs(
    progress: SweepProgress, jobs: Mapping[str, Sequence[str]], later: Sequence[float], work: Mapping[str, float]
) -> None:
    """Pass the jobs of a sweep to its progress display.

    Args:
        progress: the display.
        jobs: overrides of the recorded jobs, by folder.
        later: work of each job that is expected in later stages.
        work: of each recorded job.
    """
    progress.expect(
        _titles(jobs),
        [work.get(name, 0.0) for name in jobs],
        later_jobs=len(later),
        later_weight=sum(later),
    )


def count_ended(progress: SweepProgress, folder: Path, sweep: Sweep) -> None:
    """Count the jobs of a resumed sweep that have ended before; the progress display knows its jobs already."""
    unfinished = sweep.unfinished_jobs(folder)
    for number, name in enumerate(sweep.jobs):
        if number not in unfinished:
            progress.ended_before(progress.titles[number], read_result(folder / name))


def describe_interrupted(folder: Path, sweep: Sweep) -> str:
    """Return what is kept of an interrupted sweep, and how to resume it, as sentences."""
    unfinished, names = sweep.unfinished_jobs(folder), list(sweep.jobs)
    started = sum((folder / names[number] / CHECKPOINTS).is_dir() for number in unfinished)
    counts = [f"{len(names) - len(unfinished)} of {len(names)} jobs are done"]
    counts += [f"{started} continue{'s' * (started == 1)} from the last checkpoint"] if started else []
    command = f"lora-bench train -m {shell_argument('resume', folder)}"
    return f"{' and '.join(counts)}, all kept in {folder}. Resume the sweep with: {command}"


def training_pairs(settings: Settings) -> float:
    """Return the training pairs that a run takes, as a measure of its time.

    The rows of the data are not known yet: where they count, all data sets have the same assumed size.
    """
    trainer, tasks = settings.trainer, settings.tasks.values() or [settings.data]
    if trainer.max_steps is not None:
        return float(trainer.max_steps * trainer.batch_size)
    return trainer.epochs * sum(data.train_size or _ASSUMED_ROWS for data in tasks)


def _titles(jobs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the title of each job, by number: the overrides in which it differs from the others of its stage.

    One that is alone in the folder of its stage is called by its own folder, as `job 6: final/0`.
    """
    stages: dict[str, dict[int, Sequence[str]]] = {}
    for number, (name, job) in enumerate(jobs.items()):
        stages.setdefault(name.rpartition("/")[0], {})[number] = job
    titles: dict[int, str] = {}
    names = list(jobs)
    for stage, stage_jobs in stages.items():
        (number, *others) = stage_jobs
        titles |= job_titles(stage_jobs) if others or not stage else {number: f"job {number}: {names[number]}"}
    return [titles[number] for number in range(len(jobs))]
