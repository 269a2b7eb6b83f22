"""`lora-bench ls`: the runs below some folders, one line each, the newest last."""

from __future__ import annotations

import json
import math
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_bench.console.arguments import CommandParser, whole_number
from lora_bench.console.columns import TextColumn, print_columns
from lora_bench.console.format import format_duration
from lora_bench.console.text import note, sanitise
from lora_bench.errors import Code, UserError
from lora_bench.files.atomic_io import to_json
from lora_bench.records.run_names import TOP
from lora_bench.records.stored_run import STATES, StoredRun, differing_overrides, stored_runs

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

MAX_NOTES = 5
"""Folders that cannot be read and are named in notes."""
SORTS = ("created", "id", "name", "status", "adapter", "model", "data", "metric", "seconds")
"""Choices of `--sort`."""


def main(arguments: list[str]) -> int:
    """Run the command: print the runs; return 0, also if there are none.

    Raises:
        UserError: an argument is wrong, or a folder does not exist.
    """
    options = _parser().parse_args(arguments)
    folders = [Path(folder) for folder in options.folders]
    runs, skipped = stored_runs(folders or [TOP]) if folders or TOP.is_dir() else ([], [])
    selected = _sorted(_selected(runs, options), options.sort)[-options.limit :]  # 0: all
    if options.json:
        print(json.dumps([describe(run) for run in selected], indent=2))
    elif options.quiet:
        in_terminal = sys.stdout.isatty()
        for run in selected:
            print(sanitise(run.folder).plain if in_terminal else run.folder)  # a program needs the name as it is
    elif selected:
        from rich.console import Console

        print_columns(Console(highlight=False), _columns(selected))
    else:
        where = ", ".join(map(str, folders or [TOP]))
        note(f"none of {len(runs)} runs meets the conditions" if runs else f"there are no runs below {where}")
    for folder, reason in skipped[:MAX_NOTES]:
        note(f"skipped {folder}: {reason}")
    if len(skipped) > MAX_NOTES:
        note(f"skipped {len(skipped) - MAX_NOTES} more folders")
    return 0


def describe(run: StoredRun) -> dict[str, Any]:
    """Return a run as `--json` prints it: what the columns show, all metrics and costs, times in ISO format."""
    record = run.record
    described = {
        "id": run.id,
        "name": run.name,
        "tags": run.tags,
        "notes": run.notes,
        "folder": str(run.folder),
        "status": run.state,
        "created": record["created"],
        "finished": record["finished"],
        "adapter": run.adapter,
        "model": run.model,
        "data": run.data,
        "seed": record["config"].get("seed"),
        "score": None if run.score is None else dict([run.score]),
        "overrides": record["overrides"],
        "metrics": record["metrics"],
        "params": record["params"],
        "cost": record["cost"],
        "error": record["error"],
    }
    return to_json(described)  # type: ignore[no-any-return]


# -- selection and order --


def _selected(runs: Sequence[StoredRun], options: argparse.Namespace) -> list[StoredRun]:
    """Return the runs that meet all conditions of the options, in their order."""
    selected = [run for run in runs if set(options.tag) <= set(run.tags)]
    if options.method is not None:
        selected = [run for run in selected if run.adapter in options.method]
    if options.where is not None and selected:
        selected = _meeting(selected, options.where)
    if options.status is not None:
        selected = [run for run in selected if run.state in options.status]
    return selected


def _meeting(runs: Sequence[StoredRun], conditions: str) -> list[StoredRun]:
    """Return the runs whose configuration meets the conditions of `--where`, which are those of `compare`.

    Raises:
        UserError: the conditions are malformed or name an unknown key.
    """
    from lora_bench.analysis.settings import all_keys, describe_run, differs
    from lora_bench.analysis.where import parse
    from lora_bench.records.backfill import align_configs

    aligned = align_configs([(run.folder, run.record) for run in runs])
    described = [describe_run(folder, record) for folder, record in aligned]
    keys = all_keys(described)
    matches = parse(conditions, keys, [key for key in keys if differs(key, described)])
    return [run for run, keyed in zip(runs, described, strict=True) if matches(keyed.keys)]


def _sorted(runs: Sequence[StoredRun], key: str) -> list[StoredRun]:
    """Return the runs in ascending order of one of `SORTS`, those without a value first; equal ones by age."""
    if key == "created":
        return list(runs)

    def value(run: StoredRun) -> tuple[float, str]:
        if key == "metric":
            score = run.score
            return (-math.inf if score is None else score[1]), ""
        if key == "seconds":
            seconds = run.record["cost"].get("train_seconds")
            return (-math.inf if seconds is None else float(seconds)), ""
        texts = {"id": run.id, "name": run.name, "status": run.state, "adapter": run.adapter}
        return 0.0, str((texts | {"model": run.model, "data": run.data})[key] or "")

    return sorted(runs, key=value)


# -- columns --


def _columns(runs: Sequence[StoredRun]) -> list[TextColumn]:
    """Return the columns of the table; one without a value in any run is not printed."""
    scores = [run.score for run in runs]
    metrics = {score[0].rpartition("/")[2] for score in scores if score}
    return [
        TextColumn("id", [run.id for run in runs]),
        TextColumn("name", [run.name or "" for run in runs], min_width=8),
        TextColumn("status", [run.state for run in runs]),
        TextColumn("adapter", [run.adapter for run in runs], min_width=7),
        TextColumn("model", [run.model for run in runs], min_width=7),
        TextColumn("data", [run.data for run in runs], min_width=5),
        TextColumn(
            metrics.pop() if len(metrics) == 1 else "metric",
            [f"{score[1]:.3f}" if score else "" for score in scores],
            is_number=True,
        ),
        TextColumn("age", [_age(run.record["created"]) for run in runs], is_number=True),
        TextColumn("tags", [", ".join(run.tags) for run in runs], min_width=6),
        TextColumn("overrides", differing_overrides(runs), min_width=9),
    ]


def _age(created: str | None) -> str:
    """Return the time since a run was created, as `12 min` or `3 d`; empty without a valid time in the past."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(created or "").astimezone(UTC)).total_seconds()
    except (ValueError, OverflowError):
        return ""
    if seconds < 0:
        return ""
    return format_duration(max(seconds, 1)) if seconds < 2 * 86400 else f"{seconds / 86400:.0f} d"


# -- arguments --


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        "ls",
        description="The runs at or below the folders, one line each, the newest last. `lora-bench show RUN` has more "
        "of a run; its id, its name or `last` stands for it in other commands.",
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="folders to list (default: outputs)")
    parser.add_argument("--tag", action="append", default=[], metavar="TAG", help="only runs with this tag; repeatable")
    parser.add_argument(
        "--status", type=_statuses, metavar="STATUS[,STATUS]", help=f"only runs that are one of {', '.join(STATES)}"
    )
    parser.add_argument(
        "--method", type=_words, metavar="NAME[,NAME]", help="only runs of these methods, as in adapter=NAME"
    )
    parser.add_argument(
        "--where",
        metavar="CONDITIONS",
        help="only runs that meet conditions on config keys, as in compare: 'adapter=lora and adapter.rank<=16'",
    )
    parser.add_argument(
        "--sort",
        choices=SORTS,
        default="created",
        help="the order, ascending; metric is the main metric on the reported split (default: created)",
    )
    parser.add_argument("-n", "--limit", type=whole_number, default=0, metavar="N", help="only the last N lines")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a list of objects, with all metrics and costs")
    output.add_argument("-q", "--quiet", action="store_true", help="print only the folders")
    return parser


def _words(text: str) -> list[str]:
    """Return the words of a list with commas."""
    return [word.strip() for word in text.split(",")]


def _statuses(text: str) -> list[str]:
    """Return the statuses of a list with commas.

    Raises:
        UserError: one is not a status.
    """
    words = _words(text)
    for word in words:
        if word not in STATES:
            remedy = f"Give some of {', '.join(STATES)}."
            raise UserError("is not a status", key="--status", value=word, remedy=remedy, code=Code.UNKNOWN_CHOICE)
    return words
