"""The folder of a sweep: `sweep.json` lists its jobs, each job is a run below it, and `table.*` hold the results."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.config.keys import present_overrides
from lora_bench.errors import Code, RunFailedError, UserError, require, shell_argument
from lora_bench.files import untrusted
from lora_bench.files.atomic_io import describe_error, dump, to_json, write
from lora_bench.records import folder_lock, run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

SWEEP_FILE = "sweep.json"


TABLE_MARKDOWN, TABLE_CSV = TABLES = "table.md", "table.csv"
"""The tables that a finished sweep leaves beside its record."""

OWN_FILES = (*TABLES, "transfer.md", "transfer.csv", ".slurm", SWEEP_FILE, folder_lock.LOCK_FILE)
"""All files and folders that lora-bench writes into a sweep's folder beside its runs, the record and the lock last."""


FINAL_STATUSES = ("done", "diverged")
"""Statuses of jobs that would end the same way if they were run again."""


@dataclass(frozen=True)
class Sweep:
    """The content of `sweep.json`: the request and the jobs of a sweep."""

    created: str
    """Time in ISO format, UTC."""
    overrides: list[str]
    """The overrides as typed."""
    config_dir: str | None
    """A folder with further options of the config groups (`--config-dir`)."""
    jobs: dict[str, list[str]]
    """Overrides of each job, by its folder below the sweep's."""
    is_complete: bool = True
    """False until all jobs have ended and no later stage adds others; older records, without the key, pass for True."""

    def unfinished_jobs(self, folder: Path) -> dict[int, bool]:
        """Return the numbers, from 0, of the jobs that have not ended, each with whether its run has started.

        Raises:
            UserError: the record of a job is damaged.
        """
        unfinished = {}
        for number, name in enumerate(self.jobs):
            has_started = run_folder.holds_run(folder / name)
            if not has_started or not has_ended(run_folder.read(folder / name)):
                unfinished[number] = has_started
        return unfinished


def has_ended(run: dict[str, Any]) -> bool:
    """Return whether a sweep has no work left for the job of this record.

    A job that successive halving eliminated has ended for its sweep, though it can be resumed by itself.
    """
    # In records of version 0.1 an eliminated run is `interrupted`, and this key distinguishes it.
    was_eliminated = run["status"] == "interrupted" and "stopped_at_step" in (run["selection"] or {})
    return run["status"] in (*FINAL_STATUSES, "eliminated") or was_eliminated


def refuse_own_file(path: str | Path, key: str) -> None:
    """Refuse an output that is a file of a run or sweep, which it would damage; the file need not be there yet.

    Args:
        path: of the output.
        key: the config key or option that holds it, for messages.

    Raises:
        UserError: the path leads to `sweep.json` of a sweep, or to one of `run_folder.OWN_FILES` of a run.
    """
    try:
        target = Path(os.path.realpath(path))
        is_own = (target.name == SWEEP_FILE and target.exists()) or any(
            target.relative_to(above).parts[0] in run_folder.OWN_FILES and run_folder.holds_run(above)
            for above in target.parents
        )
    except (OSError, ValueError):  # a path that cannot be followed is refused where it is written
        return
    reason = "is part of the record of a run or sweep"
    require(not is_own, key, path, reason, "Give another file.", code=Code.EXISTS)


def create(folder: Path, overrides: list[str], config_dir: str | None, jobs: dict[str, list[str]]) -> folder_lock.Claim:
    """Claim `folder` for a new sweep, and write its record.

    Args:
        folder: is created where it does not exist.
        overrides: as typed.
        config_dir: a folder with further options of the config groups.
        jobs: overrides of each job, by its folder below the sweep's.

    Raises:
        UserError: the folder holds a sweep or a run, is inside a run's folder, is in use, cannot be written, or the
            name of a job's folder holds a secret.
    """
    sweep = Sweep(datetime.now(UTC).isoformat(timespec="milliseconds"), overrides, config_dir, jobs, is_complete=False)
    for name in jobs:
        run_folder.refuse_secret_name(folder / name)
    try:
        run_folder.refuse_inside_run(folder, "hydra.sweep.dir")
        reason, remedy = "already holds a run", "Give a folder that does not exist yet."
        require(not run_folder.holds_run(folder), "hydra.sweep.dir", folder, reason, remedy, code=Code.EXISTS)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SWEEP_FILE).exists():
            command = f"lora-bench train -m {shell_argument('resume', folder)}"
            remedy += f" Or run the unfinished jobs: {command}"
            raise UserError(
                "already holds a sweep", key="hydra.sweep.dir", value=folder, remedy=remedy, code=Code.EXISTS
            )
        lock = _claim(folder)
        _write(folder, sweep)
    except (OSError, RunFailedError) as error:
        reason = f"cannot be written: {describe_error(error)}" if isinstance(error, OSError) else error.reason
        remedy = "Give a folder that you may write."
        raise UserError(reason, key="hydra.sweep.dir", value=folder, remedy=remedy, code=Code.UNWRITABLE) from None
    return lock


def extend(folder: Path, jobs: dict[str, list[str]]) -> None:
    """Add jobs of a later stage to the record of a sweep; the caller holds the sweep's claim.

    A job of an existing name replaces the older one.

    Raises:
        UserError: as `read`.
        RunFailedError: the record cannot be written.
    """
    sweep = read(folder)
    _write(folder, replace(sweep, jobs=sweep.jobs | jobs, is_complete=False))


def complete(folder: Path) -> None:
    """Record that a sweep has no work left; the caller holds the sweep's claim. Errors are those of `extend`."""
    _write(folder, replace(read(folder), is_complete=True))


def _write(folder: Path, sweep: Sweep) -> None:
    """Write the record of a sweep, or raise a `RunFailedError`."""
    write(folder, SWEEP_FILE, dump(to_json({"schema": run_folder.SCHEMA, **asdict(sweep)})).encode())


def reopen(folder: Path) -> folder_lock.Claim:
    """Claim the folder of an existing sweep; its record is not read.

    Raises:
        UserError: another process is running the sweep, the folder cannot be written, or a table's path is a folder.
    """
    for path in (folder / name for name in TABLES):
        if path.is_dir():
            raise UserError(
                "is a folder, but the sweep writes its table to a file of this name",
                file=path,
                remedy="Move the folder away.",
                code=Code.NOT_A_FILE,
            )
    try:
        return _claim(folder)
    except OSError as error:
        raise UserError(f"cannot be written: {describe_error(error)}", file=folder, code=Code.UNWRITABLE) from None


def _claim(folder: Path) -> folder_lock.Claim:
    """Claim the folder, or raise a `UserError` if another process holds it."""
    lock = folder_lock.acquire(folder)
    if lock is None:
        raise UserError(
            "another process is running this sweep",
            file=folder,
            remedy="Wait until it ends, or stop it.",
            code=Code.IN_USE,
        )
    return lock


def is_outside(name: str) -> bool:
    """Return whether a job's folder of this name would not lie below the sweep's folder."""
    return Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name


def is_sweep(folder: Path) -> bool:
    """Return whether the folder holds the record of a sweep."""
    return (folder / SWEEP_FILE).exists()


def read(folder: Path) -> Sweep:
    """Return the record of the sweep in `folder`; it is untrusted and fully checked.

    Keys in overrides that were renamed since have their new names.

    Raises:
        UserError: it is missing, damaged or of another version, its `config_dir` does not exist, or the folder of a job
            leads out of the sweep's.
    """
    path = folder / SWEEP_FILE
    try:
        content = untrusted.read_json(path)
        if content.pop("schema") != run_folder.SCHEMA:
            raise UserError("was written by another version of lora-bench", file=path, code=Code.MISMATCH)
        sweep = Sweep(**content)
        types = ((sweep.created, str), (sweep.jobs, dict), (sweep.is_complete, bool))
        if not (_is_texts(sweep.overrides) and all(isinstance(value, type_) for value, type_ in types)):
            raise ValueError("a key has a value of another type")
        if sweep.config_dir is not None and not (isinstance(sweep.config_dir, str) and os.path.isdir(sweep.config_dir)):
            raise UserError(
                f"names a --config-dir that does not exist: {sweep.config_dir!r}", file=path, code=Code.NOT_FOUND
            )
        real = os.path.realpath(folder)
        for name, job in sweep.jobs.items():
            if is_outside(name) or not _is_texts(job):
                raise ValueError(f"job {name!r} is not valid")
            if os.path.realpath(folder / name) != os.path.join(real, os.path.normpath(name)):
                raise UserError(
                    f"the folder of job {name!r} is a symbolic link out of the sweep's folder",
                    file=path,
                    code=Code.NOT_A_FILE,
                )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"is damaged: {describe_error(error)}", file=path, code=Code.DAMAGED) from None
    return replace(
        sweep,
        overrides=present_overrides(sweep.overrides),
        jobs={name: present_overrides(job) for name, job in sweep.jobs.items()},
    )


def _is_texts(value: object) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def unfinished_sweeps(top: Path) -> Iterator[tuple[str, Path]]:
    """Yield (recorded creation time, folder) of each sweep at or below `top` with unfinished jobs or stages.

    Damaged sweeps are skipped.
    """
    for path in top.rglob(SWEEP_FILE):
        try:
            sweep = read(path.parent)
            if not sweep.is_complete or sweep.unfinished_jobs(path.parent):
                yield sweep.created, path.parent
        except UserError:
            continue
