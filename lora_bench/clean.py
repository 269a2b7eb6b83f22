"""`lora-bench clean`: remove the files of the token and prefix caches, or with --dry-run list them.

Nothing else is removed: no other file, no link or its target, no file that a process is writing, and no answer of a
language model, since answers cost money. Checkpoints of the runs below `outputs/` are removed only by name.
"""

from __future__ import annotations

import shutil
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from lora_bench.console.format import format_number
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, RunFailedError, UserError
from lora_bench.files.atomic_io import describe_error
from lora_bench.files.cache import SUFFIXES, CacheFiles, cache_folder, remove
from lora_bench.files.disk_usage import disk_usage
from lora_bench.records import folder_lock, run_folder
from lora_bench.records.run_folder import CHECKPOINTS
from lora_bench.records.run_names import TOP

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

DRY_RUN = "--dry-run"
ANSWERS = "prompt"
"""The cache folder of the answers of language models."""


def run_clean(arguments: Sequence[str], console: Console) -> None:
    """Remove or list cache files and checkpoints, and print a table of them.

    Answers of language models are listed and never removed; checkpoints are removed only if they are named.

    Args:
        arguments: names of caches, `checkpoints` (none: all caches) and `--dry-run`.
        console: for the table.

    Raises:
        UserError: an argument is unknown, or the path of the cache is not a folder.
        RunFailedError: a file could not be removed; the table is printed and the other files are gone.
    """
    for argument in arguments:
        if argument not in (*SUFFIXES, CHECKPOINTS, DRY_RUN):
            remedy = f"Give {', '.join(SUFFIXES)}, {CHECKPOINTS}, {DRY_RUN}, or nothing."
            raise UserError(f"does not accept {argument!r}", key="clean", remedy=remedy, code=Code.UNKNOWN_CHOICE)
    folder = cache_folder()
    if folder.exists() and not folder.is_dir():
        raise UserError("is not a folder", key="LORA_BENCH_CACHE", value=folder, code=Code.NOT_A_FILE)
    requested, is_dry = set(arguments) - {DRY_RUN}, DRY_RUN in arguments
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("", "files", "size", ""):
        table.add_column(header, justify="right" if header in ("files", "size") else "left")
    undeleted = 0
    for cache in SUFFIXES:
        files = CacheFiles(cache)
        is_link = files.folder.is_symlink()
        entries = [] if is_link else [*files.complete(), *files.abandoned()]
        outcome = "kept"
        if is_link:
            outcome = "a link: not followed"
        elif cache in requested or not requested:
            outcome = "would be removed" if is_dry else "removed"
        if outcome == "removed":
            remaining = sum(not remove(entry) for entry in entries)
            undeleted += remaining
            outcome = f"{remaining} cannot be removed" if remaining else outcome
        outcome = outcome if entries or is_link else "empty"
        table.add_row(cache, str(len(entries)), format_number(sum(entry.size_bytes for entry in entries), "B"), outcome)
    count, size_bytes = _answers()
    table.add_row(ANSWERS, str(count), format_number(size_bytes, "B"), "kept: answers cost money")
    table.add_row(CHECKPOINTS, *_clean_checkpoints(is_requested=CHECKPOINTS in requested, is_dry=is_dry))
    console.print(sanitise(f"caches in {folder}, checkpoints of runs in {TOP}"))
    console.print(table)
    if undeleted:
        raise RunFailedError(
            f"{undeleted} files cannot be removed",
            file=folder,
            remedy="Check the folder's permissions.",
            code=Code.UNWRITABLE,
        )


def _clean_checkpoints(*, is_requested: bool, is_dry: bool) -> tuple[str, str, str]:
    """Remove the checkpoints of runs that no process trains, if that is requested; return number, size and outcome.

    An interrupted run without checkpoints can still be resumed: it begins again.

    Raises:
        RunFailedError: one cannot be removed.
    """
    records = run_folder.find_runs([TOP])[0] if TOP.is_dir() else []
    runs = [folder for folder, _ in records if (folder / CHECKPOINTS).is_dir()]
    count = sum(len(list((folder / CHECKPOINTS).iterdir())) for folder in runs)
    size = format_number(sum(disk_usage(folder / CHECKPOINTS) for folder in runs), "B")
    if not runs:
        return "0", size, "none"
    if not is_requested:
        return str(count), size, "kept: unfinished runs resume from them"
    if is_dry:
        return str(count), size, "would be removed"
    in_use = sum(not _remove_checkpoints(folder) for folder in runs)
    return str(count), size, f"removed, but those of {in_use} running runs" if in_use else "removed"


def _remove_checkpoints(run: Path) -> bool:
    """Remove the checkpoints of a run, and return True; False if a process is training it.

    Raises:
        RunFailedError: a file cannot be removed.
    """
    try:
        claim = folder_lock.acquire(run)
        if claim is None:
            return False
        try:
            shutil.rmtree(run / CHECKPOINTS)
        finally:
            claim.release()
    except OSError as error:
        reason, remedy = f"cannot be removed: {describe_error(error)}", "Check the folder's permissions."
        raise RunFailedError(reason, file=run / CHECKPOINTS, remedy=remedy, code=Code.UNWRITABLE) from None
    return True


def _answers() -> tuple[int, int]:
    """Return the number of files in the cache of answers, and their total size in bytes; both 0 without a cache."""
    sizes = []
    with suppress(OSError):
        for path in (cache_folder() / ANSWERS).iterdir():
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes.append(status.st_size)
    return len(sizes), sum(sizes)
