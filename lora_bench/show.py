"""`lora-bench show RUN`: what a run was asked for, how it went, where its files are, and what to do next."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from lora_bench.config.schema import LAST
from lora_bench.console.arguments import CommandParser
from lora_bench.console.columns import TextColumn, print_columns
from lora_bench.console.format import format_duration, format_number
from lora_bench.console.text import sanitise
from lora_bench.errors import Code, UserError, shell_argument
from lora_bench.files.disk_usage import disk_usage
from lora_bench.records import metrics_log, run_folder
from lora_bench.records.backfill import NO_DEFAULT, changed_settings
from lora_bench.records.evaluations import read_evaluations
from lora_bench.records.live_progress import LiveProgress
from lora_bench.records.run_folder import CHECKPOINTS, METRICS_FILE, PROMPT_AGAIN, altered_notes, is_prompted
from lora_bench.records.run_names import TOP, find_run
from lora_bench.records.stored_run import StoredRun
from lora_bench.records.sweep_folder import is_sweep

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Any

    from rich.console import Console


def main(arguments: list[str]) -> int:
    """Run the command: print one run, and return 0.

    Raises:
        UserError: an argument is wrong, or there is no such run.
    """
    options = _parser().parse_args(arguments)
    folder = find_run(options.run, "show")
    if is_sweep(folder):
        remedy = f"`lora-bench ls {folder}` lists its runs, and `lora-bench compare {folder}` compares them."
        raise UserError("is the folder of a sweep", key="show", value=folder, remedy=remedy, code=Code.NOT_FOUND)
    run = StoredRun(folder, run_folder.read(folder))
    if options.json:
        print(json.dumps({"id": run.id, "folder": str(run.folder), **run.record, "status": run.state}, indent=2))
        return 0
    from rich.console import Console

    _print_run(run, Console(highlight=False, soft_wrap=True))
    return 0


def _print_run(run: StoredRun, console: Console) -> None:
    """Print the sections of a run; a section without content is left out."""
    console.print(sanitise("  ".join(filter(None, (run.id, run.name, run.state))), style="bold"))
    for line in _summary(run):
        console.print(sanitise(line))
    _print_settings(run.record, console)
    if run.record["metrics"]:
        from lora_bench.console.progress import print_metrics

        print_metrics(console, run.record["metrics"])
    for name, evaluation in read_evaluations(run.folder).items():
        values = (f"{key} {value:.4f}" for key, value in evaluation.metrics.items() if key.endswith(run.main_metric))
        console.print(sanitise(f"evaluation {name}: {', '.join(values)}"))
    costs = {key: value for key, value in run.record["cost"].items() if value is not None}
    if costs:
        console.print()
        amounts = [_amount(key, value) for key, value in costs.items()]
        print_columns(console, [TextColumn("cost", list(costs)), TextColumn("value", amounts, is_number=True)])
    _print_files(run.folder, console)
    for note in altered_notes([(run.folder, run.record)]):
        console.print(sanitise(f"note: {note}"))
    console.print("\nnext")
    for command in _next_commands(run):
        console.print(sanitise(f"  {command}"))


def _summary(run: StoredRun) -> Iterator[str]:
    """Yield the lines on what was trained on what and when, the user's annotations, and how far it came."""
    record = run.record
    seed = record["config"].get("seed")
    what = f"{run.adapter} on {run.model}, {run.data}"
    yield what if seed is None else f"{what}, seed {seed}"
    if run.tags:
        yield f"tags: {', '.join(run.tags)}"
    if run.notes:
        yield f"notes: {run.notes}"
    times = {"started": record["created"], "ended": record["finished"]}
    yield ", ".join(f"{word} {time[:19].replace('T', ' ')} UTC" for word, time in times.items() if time)
    if progress := LiveProgress.read(run.folder):
        yield progress.line
    last = metrics_log.last_value(run.folder / METRICS_FILE, run.main_metric)
    if last and run.state != "done":
        value, line = last
        yield f"last evaluation: step {line.get('step')}, {line.get('split')} {run.main_metric} {value:.4f}"
    if record["error"]:
        yield f"error: {record['error']}"


def _print_settings(record: Mapping[str, Any], console: Console) -> None:
    """Print the settings that are not defaults, with the defaults."""
    from lora_bench.analysis.table import format_value

    changed = changed_settings(record)
    console.print()
    if not changed:
        console.print("all settings are the defaults of these choices")
        return
    columns = (
        TextColumn("setting", [key for key, _, _ in changed]),
        TextColumn("value", [format_value(value) for _, value, _ in changed], min_width=10),
        TextColumn(
            "default",
            ["" if default == NO_DEFAULT else format_value(default) for _, _, default in changed],
            min_width=10,
        ),
    )
    print_columns(console, columns)


def _amount(key: str, value: float) -> str:
    """Return a cost with the unit that the end of its key names."""
    if key.endswith("seconds"):
        return format_duration(value)
    unit = {"flops": "FLOP", "bytes": "B"}.get(key.rpartition("_")[2], "")
    return format_number(value, unit) if unit or value >= 1000 else f"{value:g}"


def _print_files(folder: Path, console: Console) -> None:
    """Print the content of a run's folder with sizes in bytes; hidden files only count in the sum."""
    sizes = {path: disk_usage(path) for path in sorted(folder.iterdir())}
    listed = {path: size for path, size in sizes.items() if not path.name.startswith(".")}
    console.print()
    console.print(sanitise(f"{folder}: {format_number(sum(sizes.values()), 'B')}"))
    names = [f"  {path.name}{'/' * path.is_dir()}" for path in listed]
    amounts = [format_number(size, "B") for size in listed.values()]
    print_columns(console, [TextColumn("  file", names), TextColumn("size", amounts, is_number=True)])


def _next_commands(run: StoredRun) -> list[str]:
    """Return the commands that make sense for a run in its state."""
    has_id = TOP in run.folder.parents
    argument = f"run={run.id}" if has_id else shell_argument("run", run.folder)
    resume = f"resume={run.id}" if has_id else shell_argument("resume", run.folder)
    remove = f"lora-bench rm {run.id if has_id else shlex.quote(str(run.folder))}"
    if run.is_usable:
        return [
            f"lora-bench predict {argument} input=pairs.tsv output=labelled.tsv",
            f"lora-bench eval {argument} data=pairs data.path=DIR",
            f"lora-bench export {argument} format=peft output=ADAPTER",
        ]
    if run.state == "running":
        return [f"lora-bench watch {run.folder}"]
    if is_prompted(run.record):
        return [f"lora-bench compare {run.folder}"] if run.state == "done" else [PROMPT_AGAIN]
    if run.state == "diverged":
        return ["train it again with a smaller optimizer.lr"]
    if run.state == "failed" and not (run.folder / CHECKPOINTS).exists():
        return ["remove the cause of the error and train it again", remove]
    return [f"lora-bench train {resume}", remove]


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        "show",
        description="One run: its settings that are not defaults, metrics, costs, state, error, files and the next "
        "commands.",
    )
    parser.add_argument(
        "run",
        nargs="?",
        default=LAST,
        metavar="RUN",
        help="a folder, a name, the first digits of an id, or last (default)",
    )
    parser.add_argument("--json", action="store_true", help="print run.json with the id and the folder")
    return parser
