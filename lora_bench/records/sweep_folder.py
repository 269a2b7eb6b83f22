"""A sweep's folder: `sweep.json` says which jobs it has, each job is a run below it, and `table.*` are its result."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.errors import Code, RunFailedError, UserError, shell_argument
from lora_bench.files import untrusted
from lora_bench.files.atomic_io import describe_error, dump, to_json, write
from lora_bench.records import folder_lock, run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "sweep.json"


TABLES = ("table.md", "table.csv")
"""What a finished sweep leaves beside it."""


ENDED = ("done", "diverged")
"""Statuses of jobs that would end the same way again."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep was asked for, as it stands in its folder."""

    created: str
    overrides: list[str]
    """As typed."""
    config_dir: str | None
    """A folder with further choices of the groups."""
    jobs: dict[str, list[str]]
    """Each job's folder below the sweep's, and its overrides."""

    def lacks(self, folder: Path) -> dict[int, bool]:
        """The numbers of the jobs that have not ended, and whether each has begun."""
        found = {}
        for number, name in enumerate(self.jobs):
            begun = (folder / name / "run.json").exists()
            if not begun or not has_ended(run_folder.read(folder / name)):
                found[number] = begun
        return found


def has_ended(run: dict[str, Any]) -> bool:
    """Whether nothing is left to do for the job of this record; one that halving stopped has ended for its sweep."""
    stopped = run["status"] == "interrupted" and "stopped_at_step" in (run["selection"] or {})
    return run["status"] in ENDED or stopped


def begin(folder: Path, overrides: list[str], config_dir: str | None, jobs: dict[str, list[str]]) -> folder_lock.Claim:
    """Claim `folder` for a new sweep.

    Raises:
        UserError: it holds a sweep, or cannot be written.
    """
    made = Sweep(datetime.now(UTC).isoformat(timespec="milliseconds"), overrides, config_dir, jobs)
    for name in jobs:
        run_folder.refuse_secret(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / FILE).exists():
            command = f"lora-bench train -m {shell_argument('resume', folder)}"
            remedy = f"Give a folder that is not there yet. Or run what it lacks: {command}"
            raise UserError(
                "already holds a sweep", key="hydra.sweep.dir", value=folder, remedy=remedy, code=Code.EXISTS
            )
        lock = _take(folder)
        write(folder, FILE, dump(to_json({"schema": run_folder.SCHEMA, **asdict(made)})).encode())
    except (OSError, RunFailedError) as error:
        reason = f"cannot be written: {describe_error(error)}" if isinstance(error, OSError) else error.reason
        remedy = "Give a folder where you may write."
        raise UserError(reason, key="hydra.sweep.dir", value=folder, remedy=remedy, code=Code.UNWRITABLE) from None
    return lock


def extend(folder: Path, jobs: dict[str, list[str]]) -> None:
    """Add jobs that follow from how those before ended; whoever calls has the sweep's claim."""
    begun = read(folder)
    found = replace(begun, jobs=begun.jobs | jobs)
    write(folder, FILE, dump(to_json({"schema": run_folder.SCHEMA, **asdict(found)})).encode())


def reopen(folder: Path) -> folder_lock.Claim:
    """Claim the folder of a sweep that has begun.

    Raises:
        UserError: another process is at it, or it cannot be written.
    """
    for path in (folder / name for name in TABLES):
        if path.is_dir():
            raise UserError(
                "is a folder, where the sweep's table belongs",
                file=path,
                remedy="Move it elsewhere.",
                code=Code.NOT_A_FILE,
            )
    try:
        return _take(folder)
    except OSError as error:
        raise UserError(f"cannot be written: {describe_error(error)}", file=folder, code=Code.UNWRITABLE) from None


def _take(folder: Path) -> folder_lock.Claim:
    lock = folder_lock.take(folder)
    if lock is None:
        raise UserError(
            "another process is running this sweep",
            file=folder,
            remedy="Wait until it ends, or stop it.",
            code=Code.IN_USE,
        )
    return lock


def leads_out(name: str) -> bool:
    """Whether a job of this name would lie elsewhere than below the sweep's folder, or nowhere."""
    return Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name


def is_sweep(folder: Path) -> bool:
    return (folder / FILE).exists()


def read(folder: Path) -> Sweep:
    """What the sweep in `folder` was asked for, or a refusal that names the file."""
    path = folder / FILE
    try:
        found = untrusted.read_json(path)
        if found.pop("schema") != run_folder.SCHEMA:
            raise UserError("is of another version of lora-bench", file=path, code=Code.MISMATCH)
        sweep = Sweep(**found)
        if not (isinstance(sweep.created, str) and _is_texts(sweep.overrides) and isinstance(sweep.jobs, dict)):
            raise ValueError("a key is of another type")
        if sweep.config_dir is not None and not (isinstance(sweep.config_dir, str) and os.path.isdir(sweep.config_dir)):
            raise UserError(
                f"names a folder of choices that is not there: {sweep.config_dir!r}", file=path, code=Code.NOT_FOUND
            )
        real = os.path.realpath(folder)
        for name, job in sweep.jobs.items():
            if leads_out(name) or not _is_texts(job):
                raise ValueError(f"job {name!r} is not one")
            if os.path.realpath(folder / name) != os.path.join(real, os.path.normpath(name)):
                raise UserError(
                    f"the folder of job {name!r} is a link that leads elsewhere", file=path, code=Code.NOT_A_FILE
                )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"is damaged: {describe_error(error)}", file=path, code=Code.DAMAGED) from None
    return sweep


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def unfinished(top: Path) -> Iterator[tuple[str, Path]]:
    """When each sweep below `top` was made that has jobs left to run, and its folder."""
    for path in top.rglob(FILE):
        try:
            sweep = read(path.parent)
            if sweep.lacks(path.parent):
                yield sweep.created, path.parent
        except UserError:
            continue
