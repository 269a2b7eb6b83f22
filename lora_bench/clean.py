"""`lora-bench clean`: remove the files of the token and prefix caches, or with --dry-run list them.

Nothing else is removed: no other file, no link or its target, no file that a process is writing, and no answer of a
language model, since answers cost money.
"""

from __future__ import annotations

import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from lora_bench.console.format import format_number
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, RunFailedError, UserError
from lora_bench.files.cache import SUFFIXES, CacheFiles, cache_folder, remove

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

DRY_RUN = "--dry-run"
ANSWERS = "prompt"
"""The cache folder of the answers of language models."""


def run_clean(arguments: Sequence[str], console: Console) -> None:
    """Remove or list cache files, and print a table of them; answers of language models are listed and never removed.

    Args:
        arguments: names of caches (none: all caches) and `--dry-run`.
        console: for the table.

    Raises:
        UserError: an argument is unknown, or the path of the cache is not a folder.
        RunFailedError: a file could not be removed; the table is printed and the other files are gone.
    """
    for argument in arguments:
        if argument not in (*SUFFIXES, DRY_RUN):
            remedy = f"Give {', '.join(SUFFIXES)}, {DRY_RUN}, or nothing."
            raise UserError(f"does not accept {argument!r}", key="clean", remedy=remedy, code=Code.UNKNOWN_CHOICE)
    folder = cache_folder()
    if folder.exists() and not folder.is_dir():
        raise UserError("is not a folder", key="LORA_BENCH_CACHE", value=folder, code=Code.NOT_A_FILE)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("cache", "files", "size", ""):
        table.add_column(header, justify="right" if header in ("files", "size") else "left")
    undeleted = 0
    for cache in SUFFIXES:
        files = CacheFiles(cache)
        is_link = files.folder.is_symlink()
        entries = [] if is_link else [*files.complete(), *files.abandoned()]
        is_requested = cache in arguments or not set(arguments) & set(SUFFIXES)
        outcome = "kept"
        if is_link:
            outcome = "a link: not followed"
        elif is_requested:
            outcome = "would be removed" if DRY_RUN in arguments else "removed"
        if outcome == "removed":
            remaining = sum(not remove(entry) for entry in entries)
            undeleted += remaining
            outcome = f"{remaining} cannot be removed" if remaining else outcome
        outcome = outcome if entries or is_link else "empty"
        table.add_row(cache, str(len(entries)), format_number(sum(entry.size_bytes for entry in entries), "B"), outcome)
    count, size_bytes = _answers()
    table.add_row(ANSWERS, str(count), format_number(size_bytes, "B"), "kept: answers cost money")
    console.print(sanitise(folder))
    console.print(table)
    if undeleted:
        raise RunFailedError(
            f"{undeleted} files cannot be removed",
            file=folder,
            remedy="Check the folder's permissions.",
            code=Code.UNWRITABLE,
        )


def _answers() -> tuple[int, int]:
    """Return the number of files in the cache of answers, and their total size in bytes; both 0 without a cache."""
    sizes = []
    with suppress(OSError):
        for path in (cache_folder() / ANSWERS).iterdir():
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes.append(status.st_size)
    return len(sizes), sum(sizes)
