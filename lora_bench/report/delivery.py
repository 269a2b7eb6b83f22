"""Delivery of the page: written to a file, opened in a browser, and written again while runs finish."""

from __future__ import annotations

import sys
import tempfile
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from lora_bench.console.format import to_single_line
from lora_bench.console.text import note
from lora_bench.files.paths import write_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_bench.analysis.table import Table

EVERY = 5
"""Seconds between two versions of a watched page."""


def temporary_file() -> Path:
    """Return the path of a page in a new temporary folder, which remains."""
    return Path(tempfile.mkdtemp(prefix="lora-bench-")) / "report.html"


def deliver(
    load: Callable[[], Table],
    render: Callable[[Table, int | None], str],
    file: Path,
    *,
    show: bool = False,
    watch: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Table:
    """Write the page, and return its last table.

    While the page is watched it loads itself again every few seconds; its last version does not.

    Args:
        load: reads the runs.
        render: returns the page of a table; its second argument is the time in seconds to the next version, or None.
        file: to write.
        show: open the page in a browser.
        watch: write it again until no run is running.
        sleep: waits a number of seconds.

    Raises:
        UserError: the file cannot be written, or the runs cannot be read.
        KeyboardInterrupt: the wait was interrupted; the page is complete.
    """
    table = load()
    running = watch and is_running(table)
    write_output(file, render(table, EVERY if running else None).encode(), "--html", make_folders=True)
    print(f"written: {to_single_line(str(file))}", file=sys.stderr)
    if show and not webbrowser.open(file.resolve().as_uri()):
        note(f"no browser could be started; open {file}")
    try:
        while running:
            sleep(EVERY)
            table = load()
            running = is_running(table)
            write_output(file, render(table, EVERY if running else None).encode(), "--html")
    except (KeyboardInterrupt, SystemExit):
        write_output(file, render(table, None).encode(), "--html")
        raise
    return table


def is_running(table: Table) -> bool:
    """Return whether a run below the folders of a table is running; one whose process has ended is not."""
    return any(missing.status == "running" for missing in table.missing)
