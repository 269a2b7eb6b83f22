"""`lora-bench rm RUN…`: remove runs and sweeps, after a question; a run that a living process trains is refused.

Only what lora-bench writes is removed from a run's folder. Other files in it stay, and the folder with them.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_bench.console.arguments import CommandParser
from lora_bench.console.columns import TextColumn, print_columns
from lora_bench.console.format import format_number
from lora_bench.console.text import note
from lora_bench.errors import Code, RunFailedError, UserError
from lora_bench.files.atomic_io import describe_error
from lora_bench.files.disk_usage import disk_usage
from lora_bench.records import folder_lock, run_folder, sweep_folder
from lora_bench.records.run_names import find_folder
from lora_bench.records.stored_run import StoredRun

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Removal:
    """A folder of a run or of a sweep, and the files that are removed from it."""

    folder: Path
    files: list[Path]
    """Files and folders that lora-bench wrote, the record and the lock last."""
    run: StoredRun | None = None
    """The run; None for a sweep, and for a run whose record is damaged."""

    @classmethod
    def of_run(cls, folder: Path) -> Removal:
        """Return the removal of a run; its record may be damaged."""
        run = None
        with suppress(UserError):
            run = StoredRun(folder, run_folder.read(folder))
        return cls(folder, _own_files(folder, run_folder.OWN_FILES), run)

    @classmethod
    def of_sweep(cls, folder: Path) -> list[Removal]:
        """Return the removals of a sweep: those of its runs, then that of its own files.

        Raises:
            UserError: its record is damaged.
        """
        jobs = [folder / name for name in sweep_folder.read(folder).jobs]
        runs = [cls.of_run(job) for job in jobs if run_folder.holds_run(job)]
        return [*runs, cls(folder, _own_files(folder, sweep_folder.OWN_FILES))]

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the files before they are removed."""
        return sum(map(disk_usage, self.files))

    @cached_property
    def state(self) -> str:
        """The state of the run, `sweep`, or `damaged`."""
        if self.run is not None:
            return self.run.state
        return "sweep" if sweep_folder.is_sweep(self.folder) else "damaged"

    def others(self) -> list[str]:
        """Return the names of files in the folder that stay."""
        return sorted(path.name for path in self.folder.iterdir() if path not in self.files)


def main(arguments: list[str]) -> int:
    """Run the command: remove runs and sweeps, or list them with `--dry-run`; return 0, also if the user declines.

    All requests are checked before the first file is removed.

    Raises:
        UserError: there is no such run, a process is writing it, or nobody can be asked.
        RunFailedError: a file could not be removed.
    """
    options = _parser().parse_args(arguments)
    requested = [removal for run in options.runs for removal in _removals(find_folder(run, "rm"))]
    removals = list({os.path.realpath(removal.folder): removal for removal in requested}.values())
    for removal in removals:
        if folder_lock.is_locked(removal.folder):
            raise _in_use(removal.folder)
    if not (options.yes or options.dry_run or sys.stdin.isatty()):
        remedy = "Add --yes to remove without a question, or --dry-run to list only."
        reason = "asks before it removes, and standard input is no terminal"
        raise UserError(reason, key="rm", remedy=remedy, code=Code.MISSING)
    _print_removals(removals)
    if options.dry_run or not (options.yes or _is_confirmed(removals)):
        print("nothing was removed")
        return 0
    for removal in removals:
        _remove(removal)
    print(f"removed: {_count(removals)}")
    return 0


def _removals(folder: Path) -> list[Removal]:
    """Return what is to be removed for one folder.

    Raises:
        UserError: it holds neither a run nor a sweep, or is a link.
    """
    if folder.is_symlink():
        raise UserError("is a link", key="rm", value=folder, remedy="Give the folder itself.", code=Code.NOT_A_FILE)
    if run_folder.holds_run(folder):
        return [Removal.of_run(folder)]
    if sweep_folder.is_sweep(folder):
        return Removal.of_sweep(folder)
    remedy = "`lora-bench ls` lists the runs."
    if folder.is_dir() and run_folder.find_runs([folder])[0]:
        remedy = f"To remove all runs below it: lora-bench rm $(lora-bench ls -q {folder})"
    raise UserError("holds neither a run nor a sweep", key="rm", value=folder, remedy=remedy, code=Code.NOT_FOUND)


def _own_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files and folders of these names that are there, after unfinished files of killed processes."""
    parts = [path for path in folder.glob(".*.part") if path.name[1:].startswith(tuple(names))]
    return [*parts, *(folder / name for name in names if os.path.lexists(folder / name))]


def _print_removals(removals: Sequence[Removal]) -> None:
    """Print the runs and sweeps that are to be removed, with their sizes."""
    from rich.console import Console

    sizes = [format_number(removal.size_bytes, "B") for removal in removals]
    columns = (
        TextColumn("id", [removal.run.id if removal.run else "" for removal in removals]),
        TextColumn("name", [removal.run.name or "" if removal.run else "" for removal in removals], min_width=8),
        TextColumn("status", [removal.state for removal in removals]),
        TextColumn("size", sizes, is_number=True),
        TextColumn("folder", [str(removal.folder) for removal in removals]),
    )
    print_columns(Console(highlight=False), columns)


def _count(removals: Sequence[Removal]) -> str:
    """Return how much is removed: `2 runs, 35 MB`."""
    runs = sum(removal.state != "sweep" for removal in removals)
    size = format_number(sum(removal.size_bytes for removal in removals), "B")
    return f"{runs} run{'s' * (runs != 1)}, {size}"


def _is_confirmed(removals: Sequence[Removal]) -> bool:
    """Ask whether to remove them, and return whether the answer is `y` or `yes`; the end of the input is a no."""
    try:
        answer = input(f"Remove {_count(removals)}? [y/N] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def _remove(removal: Removal) -> None:
    """Claim a folder and remove the files; then the folder and its empty parents, unless it holds other files.

    Raises:
        UserError: another process claimed it meanwhile.
        RunFailedError: a file cannot be removed. The record is removed last, so the command can be repeated.
    """
    try:
        claim = folder_lock.acquire(removal.folder)
        if claim is None:
            raise _in_use(removal.folder)
        try:
            for path in removal.files:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            (removal.folder / folder_lock.LOCK_FILE).unlink(missing_ok=True)
        finally:
            claim.release()
    except OSError as error:
        reason, remedy = f"cannot be removed: {describe_error(error)}", "Check the permissions of the folder."
        raise RunFailedError(reason, file=removal.folder, remedy=remedy, code=Code.UNWRITABLE) from None
    run_folder.discard(removal.folder)
    if removal.folder.is_dir() and (others := removal.others()):
        note(f"{removal.folder} stays with other files: {', '.join(others[:5])}{', …' * (len(others) > 5)}")


def _in_use(folder: Path) -> UserError:
    """Return the error for a folder that a living process writes."""
    return UserError(
        "is in use: the process that holds its lock is alive",
        key="rm",
        value=folder,
        remedy="Stop it first, or wait until it ends.",
        code=Code.IN_USE,
    )


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        "rm",
        description="Remove runs, or a sweep with all its runs, after a question. A run that a living process trains "
        "is refused. Files that lora-bench did not write stay.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a folder of a run or sweep, a name, the first digits of an id, or last"
    )
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="list what would be removed, and remove nothing")
    return parser
