"""The log of a run's evaluations, `metrics.jsonl`: the only code that reads it.

Each line is an object: step, epoch, split, metrics, seconds, and `may_choose` (false) if the run may not keep the state
of this step: AdaLoRA's ranks are not final yet, or only halving needed the evaluation. The log is untrusted, a run may
be writing to it, and its process may have been killed while it wrote: a line that is not a whole object is skipped.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lora_bench.files import untrusted
from lora_bench.files.atomic_io import to_json
from lora_bench.files.untrusted import as_number

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TAIL_BYTES = 65536
"""The end of a log that `last_line` reads; a line is far shorter."""


def read_lines(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log, the oldest first.

    Raises:
        OSError: the file is absent, no regular file, or too large.
    """
    return untrusted.read_json_lines(log)


def lines_up_to(log: Path, step: int) -> list[dict[str, Any]]:
    """Return the evaluations of the selection split, of single tasks included, up to update number `step`.

    Lines of other splits, and lines without a step, are left out.

    Raises:
        OSError: as `read_lines`.
    """
    lines = []
    for line in read_lines(log):
        split, line_step = str(line.get("split")), as_number(line.get("step"))
        if split.partition("/")[0] == "selection" and line_step is not None and line_step <= step:
            lines.append(line)
    return lines


def last_line(log: Path) -> dict[str, Any] | None:
    """Return the newest whole line of a log, without reading all of it; None if there is none, or it cannot be read.

    Numbers that are not finite become None.
    """
    try:
        with untrusted.open_file(log, max_bytes=2**63) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except (OSError, ValueError):
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            content = to_json(untrusted.parse_json(line.decode()))
            if isinstance(content, dict):
                return content
    return None


def last_value(log: Path, metric: str) -> tuple[float, dict[str, Any]] | None:
    """Return a metric in the newest whole line of a log, and the line; None if that line has no number for it."""
    line = last_line(log) or {}
    metrics = line.get("metrics")
    value = as_number(metrics.get(metric)) if isinstance(metrics, dict) else None
    return None if value is None else (float(value), line)


def selection_curve(log: Path, metric: str, *, may_choose: bool = False) -> list[tuple[float, float]]:
    """Return (step, value) of a metric at each evaluation of the selection split, in the order of the steps.

    Evaluations without a number for the metric are skipped; of several at one step the last counts. A log that cannot
    be read gives an empty list.

    Args:
        log: the file.
        metric: its name.
        may_choose: leave out evaluations whose state the run may not keep.
    """
    points: dict[float, float] = {}
    with suppress(OSError, ValueError):
        for line in read_lines(log):
            metrics, step = line.get("metrics"), as_number(line.get("step"))
            value = as_number(metrics.get(metric)) if isinstance(metrics, dict) else None
            is_left_out = may_choose and line.get("may_choose") is False
            if line.get("split") == "selection" and not is_left_out and step is not None and value is not None:
                points[float(step)] = float(value)
    return sorted(points.items())
