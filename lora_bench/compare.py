"""`lora-bench compare`: the runs below some folders as one table, best first.

Runs whose configurations are equal except for the seed are one setting: mean, standard deviation and n over the seeds.
A row is one setting: that of its method which is best on the selection split. The first columns are the keys that vary
between rows, named as in the configuration: a header pasted into the shell is a valid override. A key that only follows
from a choice that varies (`model.hub_id` from `model`) has no column.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lora_bench.analysis.best import save_best
from lora_bench.analysis.formats import to_csv, to_json, to_latex, to_markdown
from lora_bench.analysis.significance import MARGIN
from lora_bench.analysis.summary import View, summarise
from lora_bench.analysis.terminal import render
from lora_bench.config.metric_names import ALL_MAIN_METRICS
from lora_bench.console.arguments import CommandParser, whole_number
from lora_bench.console.format import to_single_line
from lora_bench.console.stages import show_progress, stage
from lora_bench.errors import Code, UserError
from lora_bench.files.paths import check_output, is_stream

if TYPE_CHECKING:
    from lora_bench.analysis.table import Table


FORMATS = {"csv": to_csv, "md": to_markdown, "latex": to_latex, "json": to_json}
"""Formats of `--format` besides `table`."""


def main(arguments: list[str]) -> int:
    """Run the command: print the table, or write the page; return 0 also if runs have failed.

    Raises:
        UserError: an argument, folder or key is unknown, or there are no runs.
    """
    options = _parser().parse_args(arguments)
    _check_page_options(options)
    if options.html is not None or options.open:
        return _write_page(options)
    table = _load(options)
    if options.best is not None:
        save_best(table, options.best)
    if options.format == "table":
        render(table, Console(highlight=False))
        return 0
    print(FORMATS[options.format](table), end="")
    if options.format in ("csv", "json"):
        for line in (*table.footnotes, *table.advice):
            print(to_single_line(line), file=sys.stderr)
    return 0


def _load(options: argparse.Namespace) -> Table:
    """Return the table of the runs below the folders.

    Raises:
        UserError: a folder, key or condition is wrong, or there are no runs.
    """
    folders = [Path(folder) for folder in options.folders or ["outputs"]]
    settings = {name: getattr(options, name) for name in ("by", "baseline", "margin", "measure", "target", "where")}
    with show_progress(Console(stderr=True, highlight=False, soft_wrap=True)), stage("reading the runs"):
        table = summarise(folders, **settings, view=View(options.all, options.sort, options.top))
    if not options.anchors:
        return table
    from lora_bench.analysis.published import add_published_results  # late: numpy

    return add_published_results(table)


def _check_page_options(options: argparse.Namespace) -> None:
    """Refuse options that exclude each other.

    Raises:
        UserError: `--open` or `--watch` are given with a format, a stream, or without a page; or `--anchors` with a
            format that has runs only.
    """
    has_page = options.html is not None or options.open
    if options.watch and not has_page:
        remedy = "Add --open or --html FILE."
        raise UserError("needs a page to write", key="--watch", remedy=remedy, code=Code.CONFLICT)
    for option in ("open", "watch"):
        if getattr(options, option) and options.format != "table":
            reason = f"cannot be used with --format {options.format}: it is about the page"
            raise UserError(reason, key=f"--{option}", code=Code.CONFLICT)
        if getattr(options, option) and options.html is not None and is_stream(options.html):
            remedy = "Give --html a file."
            raise UserError(
                "needs a file, and --html is a stream", key=f"--{option}", remedy=remedy, code=Code.CONFLICT
            )
    if options.anchors and options.format in ("csv", "json") and not has_page:
        remedy = "csv and json contain runs only; use --format table, md or latex."
        raise UserError(
            f"cannot be used with --format {options.format}", key="--anchors", remedy=remedy, code=Code.CONFLICT
        )


def _write_page(options: argparse.Namespace) -> int:
    """Write the page of `--html` and `--open`, and write it again with `--watch`; return 0."""
    from lora_bench.records.sweep_folder import refuse_own_file
    from lora_bench.report import page  # late: numpy, jinja2
    from lora_bench.report.delivery import deliver, temporary_file

    if options.html is not None:
        refuse_own_file(options.html, "--html")
        check_output(options.html, "--html", make_folders=True)
    table = deliver(
        lambda: _load(options),
        lambda table, refresh: page(table, options.margin, refresh),
        options.html or temporary_file(),
        show=options.open,
        watch=options.watch,
    )
    if options.best is not None:
        save_best(table, options.best)
    return 0


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = CommandParser(
        "compare",
        description="One table of the runs at or below the folders: a row per method, with its setting that is best on "
        "the selection split, mean ± sample standard deviation over seeds; then tests against a baseline, and advice. "
        "Runs that are not done, and folders that cannot be read, are listed below.",
        epilog="Column headers are config keys: what the column adapter.rank shows is given as adapter.rank=8.",
    )
    parser.add_argument(
        "folders",
        nargs="*",
        metavar="DIR",
        help="run folders, sweeps, folders above, or names and ids of runs (default: outputs)",
    )
    parser.add_argument(
        "--by",
        metavar="KEY[,KEY]",
        help="a row per value of this config key in place of a row per method: --by adapter, --by adapter.rank",
    )
    parser.add_argument("--all", action="store_true", help="also show the settings that are not best of their method")
    parser.add_argument(
        "--where",
        metavar="CONDITIONS",
        help="compare only runs that meet conditions on config keys: 'adapter=lora and adapter.rank<=16'",
    )
    parser.add_argument("--sort", metavar="COLUMN", help="sort the rows by a column: --sort cost.train_flops")
    parser.add_argument("--top", type=whole_number, metavar="N", help="show the first N rows")
    parser.add_argument(
        "--best",
        type=Path,
        metavar="DIR",
        help="write the recommended setting to DIR/experiment/best.yaml; use it with "
        "`lora-bench train --config-dir DIR experiment=best`",
    )
    parser.add_argument(
        "--format",
        choices=["table", *FORMATS],
        default="table",
        help="table (default) for people; csv and json with raw numbers; md and latex to paste",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with advice, charts and all tables; it opens offline"
    )
    parser.add_argument(
        "--open", action="store_true", help="show the page in the browser; without --html it is a temporary file"
    )
    parser.add_argument(
        "--watch", action="store_true", help="write the page again every few seconds until no run is running"
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the row that the others are tested against: full, adapter=lora,adapter.rank=8, or the folder, name "
        "or id of a run "
        "(default: full fine-tuning, else plain LoRA, else the row best on selection)",
    )
    parser.add_argument(
        "--margin",
        type=_fraction,
        default=MARGIN,
        metavar="DIFFERENCE",
        help=f"the largest difference that counts as equivalent (default: {MARGIN:g}, one point)",
    )
    parser.add_argument(
        "--measure",
        choices=ALL_MAIN_METRICS,
        help="the metric to test (default: the main metric of the runs; name it before you see the results)",
    )
    parser.add_argument(
        "--target",
        type=_fraction,
        metavar="VALUE",
        help="count steps and FLOPs up to this main metric on the selection split (default: the final one of full "
        "fine-tuning)",
    )
    parser.add_argument(
        "--anchors", action="store_true", help="show published results beside runs on GLUE's QQP dev set"
    )
    return parser


def _fraction(text: str) -> float:
    """Return an argument as a number between 0 and 1, ends excluded.

    Raises:
        argparse.ArgumentTypeError: it is not such a number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must be above 0 and below 1")
    return value
