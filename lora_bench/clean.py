"""`lora-bench clean`: remove the files of the token and prefix caches, or with --dry-run list what would go.

Nothing else is touched: no other file, no link and nothing behind one, no file that a process is writing, and no answer
of a language model, since answers cost money.
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
"""The folder of the answers of language models."""


def run_clean(arguments: Sequence[str], console: Console) -> None:
    """Remove, or list, the cache files of the kinds that the arguments name; of all kinds where they name none.

    Raises:
        UserError: an unknown argument, or the cache folder is none.
        RunFailedError: a file could not be removed.
    """
    for argument in arguments:
        if argument not in (*SUFFIXES, DRY_RUN):
            remedy = f"Give {', '.join(SUFFIXES)}, {DRY_RUN}, or nothing."
            raise UserError(f"takes no {argument!r}", key="clean", remedy=remedy, code=Code.UNKNOWN_CHOICE)
    folder = cache_folder()
    if folder.exists() and not folder.is_dir():
        raise UserError("is not a folder", key="LORA_BENCH_CACHE", value=folder, code=Code.NOT_A_FILE)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("cache", "files", "size", ""):
        table.add_column(header, justify="right" if header in ("files", "size") else "left")
    stuck = 0
    for kind in SUFFIXES:
        files = CacheFiles(kind)
        is_link = files.folder.is_symlink()
        entries = [] if is_link else [*files.complete(), *files.abandoned()]
        is_requested = kind in arguments or not set(arguments) & set(SUFFIXES)
        outcome = "left as it is"
        if is_link:
            outcome = "a link: not followed"
        elif is_requested:
            outcome = "would be removed" if DRY_RUN in arguments else "removed"
        if outcome == "removed":
            remaining = sum(not remove(entry) for entry in entries)
            stuck += remaining
            outcome = f"{remaining} cannot be removed" if remaining else outcome
        outcome = outcome if entries or is_link else "empty"
        table.add_row(kind, str(len(entries)), format_number(sum(entry.size_bytes for entry in entries), "B"), outcome)
    count, size_bytes = _answers()
    table.add_row(ANSWERS, str(count), format_number(size_bytes, "B"), "kept: answers cost money")
    console.print(sanitise(folder))
    console.print(table)
    if stuck:
        raise RunFailedError(
            f"{stuck} files cannot be removed",
            file=folder,
            remedy="Check the folder's permissions.",
            code=Code.UNWRITABLE,
        )


def _answers() -> tuple[int, int]:
    """Return the number of files with answers of language models, and their bytes."""
    sizes = []
    with suppress(OSError):
        for path in (cache_folder() / ANSWERS).iterdir():
            facts = path.lstat()
            if stat.S_ISREG(facts.st_mode):
                sizes.append(facts.st_size)
    return len(sizes), sum(sizes)
